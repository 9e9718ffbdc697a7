"""Every way to run or train a model, in the order of the table, and what each of them takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import is_peft_available

from zo_hf.planner.assumptions import OPTIMIZER_COPIES, Assumptions
from zo_hf.planner.measure import Usage, backward, inference, zeroth_order
from zo_hf.planner.model import build, fill, shortened, size_in_bytes, tensors
from zo_hf.planner.quantised import computed_in, quantised_layers, saved_bytes
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
    def is_quantised(self) -> bool:
        """Whether the linear layers' weights are."""
        return self.base not in (HALF, FLOAT32)

    @property
    def needs_backward(self) -> bool:
        """Whether it is there for comparison only."""
        return self.kind in ("LoRA", "QLoRA", "AdamW")


WAYS = (
    *(Way("inference", base) for base in (HALF, INT8, NF4)),
    *(Way("low_rank", base) for base in (FLOAT32, HALF, INT8, NF4, NF4_DOUBLE)),
    Way("low_rank, folding", INT8),
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
        moves: number of coordinates, or of trained weights.
        weights: the model's parameters and buffers, an adapter's included.
        state: what stays from step to step beside them, the optimizer's included.
        working: what the peak of a step has beyond that.
    """

    moves: int
    weights: int
    state: int
    working: int


# Layers of the two models that a deeper one is extrapolated from.
FEW, MORE = 2, 3


def footprints(config: PretrainedConfig, given: Assumptions, ways: Sequence[Way]) -> dict[Way, Footprint]:
    """What each way takes.

    With equal layers the peak of each phase of a step is linear in their number, so a deep model is traced twice, cut
    to a few layers. Weights are always counted on the whole model.

    Raises:
        ValueError: the model's forward depends on values, so that it cannot be traced, or an adapter does not fit it.
    """
    depth = config.num_hidden_layers
    depths = (FEW, MORE) if depth > MORE and _has_equal_layers(config, given) else (depth,)
    traced = [_trace(config if count == depth else shortened(config, count), given, ways) for count in depths]
    found = {}
    for in_float32, wrapped, group in _groups(ways):
        model, linear = _build(config, given, in_float32, wrapped)
        size = size_in_bytes(tensors(model))
        for way in group:
            usages = [usage[_key(way)] for usage in traced]
            usage = usages[0] if len(usages) == 1 else _extrapolated(usages[0], usages[1], depth)
            weights = size - (saved_bytes(linear.values(), way.base) if way.is_quantised else 0)
            found[way] = _footprint(way, weights, usage, given)
    return found


def _trace(config: PretrainedConfig, given: Assumptions, ways: Sequence[Way]) -> dict[Any, Usage]:
    usages: dict[Any, Usage] = {}
    for in_float32, wrapped, group in _groups(ways):
        model, linear = _build(config, given, in_float32, wrapped)
        with without_values():
            fill(model)
            for way in group:
                if _key(way) not in usages:
                    with (
                        computed_in(linear.values(), way.base, way.kind != "inference")
                        if way.is_quantised
                        else nullcontext()
                    ):
                        try:
                            usages[_key(way)] = _usage(model, linear, way, given)
                        except RuntimeError as error:  # routing to experts, for one, looks at values
                            reason = str(error).split("\n")[0].rstrip(".")
                            raise ValueError(
                                f"model={config.model_type!r} cannot be planned: a step of {way.kind} does not run on "
                                f"tensors without values ({reason}); take a dense model such as Llama, OPT or GPT-2."
                            ) from None
    return usages


def _groups(ways: Sequence[Way]) -> Iterator[tuple[bool, bool, list[Way]]]:
    """Ways that share a model: whether it is in float32, whether an adapter is in it, and the ways."""
    for in_float32, wrapped in itertools.product((False, True), repeat=2):
        group = [way for way in ways if (way.base == FLOAT32, way.uses_adapter) == (in_float32, wrapped)]
        if group:
            yield in_float32, wrapped, group


def _build(config: PretrainedConfig, given: Assumptions, in_float32: bool, wrapped: bool) -> tuple[Any, dict]:
    """The model, with its adapter if it has one, and the layers that may be quantised."""
    model = build(config, torch.float32 if in_float32 else getattr(torch, given.dtype), given.attention)
    linear = quantised_layers(model)
    return _with_adapter(model, given) if wrapped else model, linear


def _key(way: Way) -> tuple:
    """Ways with the same key take the same beside the weights: double quantisation changes only these."""
    return way.kind, NF4 if way.base == NF4_DOUBLE else way.base, way.checkpointing


def _has_equal_layers(config: PretrainedConfig, given: Assumptions) -> bool:
    few, more, whole = (
        sum(p.numel() for p in build(c, torch.float32, given.attention).parameters())
        for c in (shortened(config, FEW), shortened(config, MORE), config)
    )
    return (whole - few) * (MORE - FEW) == (more - few) * (config.num_hidden_layers - FEW)


def _extrapolated(few: Usage, more: Usage, depth: int) -> Usage:
    def at_depth(a: int, b: int) -> int:
        return a + (b - a) * (depth - FEW) // (MORE - FEW)

    phases = tuple(at_depth(a, b) for a, b in zip(few.phases, more.phases, strict=True))
    return Usage(at_depth(few.moves, more.moves), at_depth(few.state, more.state), phases)


def _footprint(way: Way, weights: int, usage: Usage, given: Assumptions) -> Footprint:
    optimizer = "adamw" if way.needs_backward else given.optimizer
    if way.kind in ("inference", "full"):  # the seeded SGD of `full` keeps nothing
        optimizer = "sgd"
    kept = 4 * usage.moves * OPTIMIZER_COPIES[optimizer]
    return Footprint(usage.moves, weights, usage.state + kept, max(usage.phases) - usage.state)


def _usage(model: Any, linear: dict[str, nn.Module], way: Way, given: Assumptions) -> Usage:
    if way.kind == "inference":
        return inference(model, given)
    if way.needs_backward:
        return backward(model, given, way.checkpointing)
    makers: dict[str, Callable] = {
        "low_rank": lambda: _low_rank(model, linear, way, given.rank),
        "low_rank, folding": lambda: TracedLowRank(model, given.rank, requantises=True),
        "norms": lambda: TracedLowRank(model, 1, _vectors(model), folds=False),
        "full": lambda: TracedFull(model),
        "scales": lambda: TracedScales(model, linear, way.base),
        "adapter": lambda: TracedAdapter(model),
    }
    return zeroth_order(model, makers[way.kind], given)


def _low_rank(model: Any, linear: dict[str, nn.Module], way: Way, rank: int) -> TracedLowRank:
    if not way.is_quantised:
        return TracedLowRank(model, rank)
    return TracedLowRank(model, rank, [f"{name}.weight" for name in linear], folds=False)


def _vectors(model: Any) -> list[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    if not names:
        raise ValueError(f"{type(model).__name__} has no parameter of one dimension for norms to move.")
    return names


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
