"""How a run divides its model among processes: shards of every weight (FSDP2), or layers (a pipeline)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.parallel.ranks import Grid


class Division(Protocol):
    """Divides the model of a run among its processes.

    Attributes:
        base_hash: `weights_hash` of the model when it was divided; None once its weights have changed.
        facts: what it adds to the facts about a run, see `zo_hf.case.Case`.
    """

    base_hash: str | None
    facts: frozenset[str]

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that cannot be divided, before anything else is done with it.

        Raises:
            ValueError: it cannot; the message says why.
        """

    def shard(self, model: nn.Module, adapter: bool) -> None:
        """Divide the model in place and for good, with the first process's weights; one that is divided stays as it is.

        Args:
            model: the model.
            adapter: True if the trainable parameters are an adapter's, which stay whole.
        """

    def enter(self, evaluator: ProbeEvaluator, model: nn.Module) -> None:
        """Let an evaluator know that all processes make its forward passes together."""

    def check_steps(self, zo: ZerothOrder, grid: Grid, parallel: str) -> None:
        """Refuse steps in which a process would wait for another one forever.

        Args:
            zo: the engine.
            grid: the place of this process among the others.
            parallel: the value of `zo_parallel`.

        Raises:
            ValueError: there are such steps; the message names the argument.
        """

    def passes(self, closure: Any, zo: ZerothOrder) -> AbstractContextManager[None]:
        """Return the context of the forward passes that evaluate a loss."""
