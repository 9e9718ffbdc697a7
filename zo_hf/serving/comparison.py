"""A comparison of a server's model with the run's own, on a few rows of tokens.

    base       mean |log p_server - log p_own|  <=  2 % of mean |log p_own|         without an adapter
    adapter    mean |log p_server - log p_own|  <=  25 % of its mean effect         at a point far enough away

The tokens are arbitrary, so that their probabilities are small and models differ much in them. Half precision explains
about a quarter of what is allowed (docs/guides/serving.md). The second line finds a server that leaves out layers of the
adapter, which vLLM does in silence for `--lora-target-modules`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Stream
from zo_hf.serving.adapter_files import AdapterFiles
from zo_hf.serving.client import Server
from zo_hf.serving.errors import BadAnswer, ServerLost, ServingError
from zo_hf.serving.points import moved
from zo_hf.subspaces.evaluation_mode import in_evaluation_mode

if TYPE_CHECKING:
    from peft import PeftModel

ROWS, LENGTH = 2, 16
#: Parts of the numbers above that may differ.
BASE, ADAPTER = 0.02, 0.25
#: Effect of the adapter in nats from which on it is compared, and how often its distance is doubled for that.
EFFECT, DOUBLINGS = 1.0, 16


@dataclass(frozen=True)
class Comparison:
    """Answers that a server of the run's model gives, within rounding.

    Args:
        rows: tokens of every row, (ROWS, LENGTH), int64.
        base: log-probabilities without an adapter of every token but a row's first, (ROWS, LENGTH - 1), float32.
        adapted: the same at a point away from the present one; None compares no adapter.
        plain: an adapter without effect. It stands for the base model, because vLLM 0.32 on the CPU gives requests without
            an adapter the one in its last slot if they share a batch with others.
        folder: the adapter at that point, or at the present one.
        rank: r of the adapter.
    """

    rows: Tensor
    base: Tensor
    adapted: Tensor | None
    plain: Path
    folder: Path
    rank: int

    def check(self, server: Server, name: str, slots: int) -> None:
        """Compare a server, and leave the adapter loaded unless that raises.

        Args:
            server: the server.
            name: a name for the adapter.
            slots: number of adapters that the run loads at a time.

        Raises:
            ServingError: it serves another model, or does not take the adapter; the message says which.
            ServerLost: it does not answer.
        """
        rows, plain = self.rows.tolist(), f"{name}-plain"
        self._load(server, plain, self.plain, slots)
        try:
            apart, size = _apart(server.log_probabilities(plain, rows), self.base), self.base.abs().mean().item()
        finally:
            server.unload(plain)
        if not apart <= BASE * size:
            raise ServingError(
                f"{server.url} serves another model than the one that is trained: log-probabilities of tokens differ by "
                f"{apart:.2g} on average, of {size:.2g}; start it with the same weights."
            )
        self._load(server, name, self.folder, slots)
        if self.adapted is None:
            return
        try:
            self._check_adapter(server, server.log_probabilities(name, rows), self.adapted)
        except Exception:
            with contextlib.suppress(ServerLost, BadAnswer, ServingError):
                server.unload(name)
            raise

    def _check_adapter(self, server: Server, found: list[list[float]], adapted: Tensor) -> None:
        apart, effect = _apart(found, adapted), (adapted - self.base).abs().mean().item()
        if not apart <= ADAPTER * effect:
            raise ServingError(
                f"{server.url} does not apply the whole adapter: log-probabilities of tokens differ by {apart:.2g} on "
                f"average, for an effect of {effect:.2g}; let its --lora-target-modules be those of the adapter."
            )

    def _load(self, server: Server, name: str, folder: Path, slots: int) -> None:
        try:
            server.load(name, str(folder))
        except BadAnswer as error:
            raise ServingError(
                f"{server.url} does not take the adapter ({error}); start it with --max-lora-rank {self.rank} or more and "
                f"--max-loras {slots} or more, or lower server_max_loras."
            ) from error


def comparison(model: PeftModel, files: AdapterFiles, zo: ZerothOrder | None) -> Comparison:
    """Evaluate the rows in this process, which takes a few forward passes of 32 tokens.

    Args:
        model: the model.
        files: writes its adapter.
        zo: the engine in it; None compares no adapter.
    """
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    # Half of it, because a server may know fewer tokens than the model has room for.
    rows = (7919 * torch.arange(ROWS * LENGTH) + 13).remainder(max(2, vocabulary // 2)).view(ROWS, LENGTH)
    with _as_it_is(model):
        with model.disable_adapter():
            base = _log_probabilities(model, rows)
        plain = files.write({name: torch.zeros_like(p) for name, p in model.named_parameters() if "lora_B" in name})
        if zo is None:
            return Comparison(rows, base, None, plain, files.write({}), files.rank)
        scale = zo.estimator.eps
        for _ in range(DOUBLINGS):
            with zo.subspace.at((Probe(0, scale),), lambda index: Stream(zo.seed, -1, index), GAUSSIAN):
                adapted = _log_probabilities(model, rows)
                if (adapted - base).abs().mean().item() >= EFFECT:
                    break
            scale *= 2
        with zo.subspace.at((Probe(0, scale),), lambda index: Stream(zo.seed, -1, index), GAUSSIAN):
            return Comparison(rows, base, adapted, plain, files.write(moved(zo.subspace)), files.rank)


@torch.no_grad()
def _log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    rows = rows.to(next(model.parameters()).device)
    logits = model(input_ids=rows).logits[:, :-1].float()
    found: Tensor = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0].cpu()
    return found


def _apart(found: list[list[float]], own: Tensor) -> float:
    return (torch.tensor(found) - own).abs().mean().item()


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and give back modes and `requires_grad`, which PEFT sets when it enables."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with in_evaluation_mode(model):
            yield
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
