"""The facts about a run that are known when it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from zo_hf.directions import DISTRIBUTIONS, Distribution
from zo_hf.method_info import plain
from zo_hf.offload import is_offloaded
from zo_hf.quantization import is_quantized, quantized_layers
from zo_hf.settings import Settings
from zo_hf.subspaces import Subspace
from zo_hf.subspaces.peft_methods import is_peft


@dataclass(frozen=True)
class Case:
    """The facts about a run that are known when it is checked.

    Args:
        settings: the run's method.
        arguments: values of `ZOConfig`, by name; empty without a Trainer.
        facts: those that hold among "quantized" (by transformers), "quantized layers", "adapter on a quantized model",
            "offloaded" (weights that are kept off the device), "several processes", "fsdp", "optimizers" (the user's own
            optimizer), "optimizer_cls_and_kwargs", "create_optimizer" (the optimizer of a subclass that overrides it),
            "another class" than SGD and "own rates" of parameter groups (both from a subclass's
            `get_optimizer_cls_and_kwargs`), "schedule-free" (an optimizer that swaps its parameters for an evaluation) and
            "kernels" (they run on the model's device).
        distribution: the distribution of directions, if it exists already; it need not be one of the named ones.
        subspace: the subspace, if it exists already; it need not be one of the named ones.
    """

    settings: Settings
    arguments: Mapping[str, Any] = field(default_factory=dict)
    facts: frozenset[str] = frozenset()
    distribution: Distribution | None = None
    subspace: Subspace | None = None

    @property
    def direction_kind(self) -> type[Distribution]:
        """The class that directions are drawn from."""
        return DISTRIBUTIONS[self.settings.direction] if self.distribution is None else type(self.distribution)

    @property
    def values(self) -> dict[str, str]:
        """The value of every option, as an error shows it."""
        named = {f"zo_{f.name}": getattr(self.settings, f.name) for f in fields(self.settings)}
        if self.distribution is not None:
            named["zo_direction"] = self.distribution.name
        return {name: repr(plain(value)) for name, value in {**self.arguments, **named}.items()}

    def argument(self, name: str) -> Any:
        """The value of an argument; None without a Trainer."""
        return self.arguments.get(name)


def facts_of_model(model: nn.Module) -> frozenset[str]:
    """Return those facts of a `Case` that a model tells."""
    has_quantized_layers = bool(quantized_layers(model))
    facts = {
        "quantized": is_quantized(model),
        "quantized layers": has_quantized_layers,
        "adapter on a quantized model": is_peft(model) and has_quantized_layers,
        "offloaded": is_offloaded(model),
    }
    return frozenset(name for name, holds in facts.items() if holds)
