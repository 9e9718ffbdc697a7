"""Every way to run or train a model, in the order of the table, and what each of them takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import is_peft_available

from zo_hf.planner.assumptions import Assumptions
from zo_hf.planner.measure import Usage, backward, inference, zeroth_order
from zo_hf.planner.model import build, fill, size_in_bytes, tensors
from zo_hf.planner.quantised import computed_in, saved_bytes
from zo_hf.planner.subspaces import TracedAdapter, TracedFull, TracedLowRank, TracedScales
from zo_hf.planner.trace import without_values

HALF, FLOAT32 = "half", "float32"
INT8, NF4, NF4_DOUBLE = "int8", "nf4", "nf4 double"


@dataclass(frozen=True)
class Way:
    """A row of the plan.

    Args:
        kind: what runs: inference, a value of `zo_subspace`, or a method with a backward pass.
        base: format of the weights: "half" (the assumed dtype), "float32", "int8", "nf4" or "nf4 double".
        checkpointing: of activations, for a backward pass.
    """

    kind: str
    base: str
    checkpointing: bool = False

    @property
    def uses_adapter(self) -> bool:
        """Whether PEFT wraps the model."""
        return self.kind in ("adapter", "LoRA", "QLoRA")

    @property
    def needs_backward(self) -> bool:
        """Whether it is there for comparison only."""
        return self.kind in ("LoRA", "QLoRA", "AdamW")


WAYS = (
    *(Way("inference", base) for base in (HALF, INT8, NF4)),
    *(Way("low_rank", base) for base in (FLOAT32, HALF, INT8, NF4, NF4_DOUBLE)),
    *(Way("full", base) for base in (FLOAT32, HALF)),
    *(Way("norms", base) for base in (HALF, NF4)),
    *(Way("scales", base) for base in (INT8, NF4)),
    *(Way("adapter", base) for base in (HALF, INT8, NF4, NF4_DOUBLE)),
    Way("LoRA", HALF),
    Way("LoRA", HALF, checkpointing=True),
    Way("QLoRA", NF4_DOUBLE),
    Way("QLoRA", NF4_DOUBLE, checkpointing=True),
    Way("AdamW", FLOAT32),
    Way("AdamW", FLOAT32, checkpointing=True),
)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one way.

    Args:
        weights: the model's parameters and buffers, an adapter's included.
        usage: everything else.
    """

    weights: int
    usage: Usage


def footprints(config: PretrainedConfig, given: Assumptions, ways: tuple[Way, ...]) -> dict[Way, Footprint]:
    """What each way takes.

    Raises:
        ValueError: the model's forward depends on values, so that it cannot be traced.
    """
    found: dict[Way, Footprint] = {}
    usages: dict[Any, Usage] = {}
    # One model at a time, shared by the ways with the same weights and wrapper.
    for in_float32, wrapped in itertools.product((False, True), repeat=2):
        todo = [way for way in ways if (way.base == FLOAT32, way.uses_adapter) == (in_float32, wrapped)]
        if not todo:
            continue
        base = build(config, torch.float32 if in_float32 else getattr(torch, given.dtype), given.attention)
        model = _with_adapter(base, given) if wrapped else base
        size = size_in_bytes(tensors(model))
        with without_values():
            fill(model)
            for way in todo:
                quantised = None if way.base in (HALF, FLOAT32) else way.base
                # Double quantisation changes the weights alone.
                key = (way.kind, NF4 if quantised == NF4_DOUBLE else way.base, way.checkpointing)
                if key not in usages:
                    with computed_in(base, quantised):
                        usages[key] = _usage(model, way, given)
                smaller = saved_bytes(base, quantised) if quantised else 0
                found[way] = Footprint(size - smaller, usages[key])
    return found


def _usage(model: Any, way: Way, given: Assumptions) -> Usage:
    if way.kind == "inference":
        return inference(model, given)
    if way.needs_backward:
        return backward(model, given, way.checkpointing)
    makers: dict[str, Callable] = {
        "low_rank": lambda: TracedLowRank(model, given.rank),
        "norms": lambda: TracedLowRank(model, given.rank, only_vectors=True),
        "full": lambda: TracedFull(model),
        "scales": lambda: TracedScales(model, way.base),
        "adapter": lambda: TracedAdapter(model),
    }
    return zeroth_order(model, makers[way.kind], given)


def _with_adapter(model: Any, given: Assumptions) -> Any:
    """The model with a LoRA adapter, as PEFT makes it.

    Raises:
        ValueError: PEFT is not installed, or does not find the targets.
    """
    if not is_peft_available():
        raise ValueError("ways with an adapter need peft: install it with `pip install zo_hf[peft]`.")
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_CHOICE

    targets: Any = list(given.lora_targets) or PEFT_CHOICE.get(model.config.model_type, "all-linear")
    if targets == ["all-linear"]:
        targets = "all-linear"
    try:
        return get_peft_model(model, LoraConfig(r=given.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise ValueError(
            f"lora_targets={list(given.lora_targets)} cannot be adapted ({str(error).split('.')[0]}); name linear layers "
            "of the model, or 'all-linear'."
        ) from None
