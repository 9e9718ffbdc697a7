"""The setups for running or training a model, in the order of the table, and the memory of each."""

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

from zo_hf.memory.assumptions import OPTIMIZER_COPIES, Assumptions
from zo_hf.memory.measure import Usage, backward, inference, zeroth_order
from zo_hf.memory.model import build, fill, layers, shortened, size_in_bytes, tensors
from zo_hf.memory.quantized import computed_in, quantizable_layers, saved_bytes
from zo_hf.memory.subspaces import TracedAdapter, TracedFull, TracedLowRank, TracedScales
from zo_hf.memory.trace import without_values
from zo_hf.reason import reason_of
from zo_hf.subspaces.peft_methods import base_model, is_peft

HALF, FLOAT32 = "half", "float32"
INT8, NF4, NF4_DOUBLE = "int8", "nf4", "nf4 double"


@dataclass(frozen=True)
class Setup:
    """A method on a format of the weights; a row of the plan.

    Args:
        kind: inference, a value of `zo_subspace`, or a method with a backward pass.
        base: format of the weights: "half" (the assumed dtype), "float32", "int8", "nf4" or "nf4 double".
        checkpointing: True for activation checkpointing, in a method with a backward pass.
        streamed: True for weights that are kept off the device, see `zo_hf.offload`.
    """

    kind: str
    base: str
    checkpointing: bool = False
    streamed: bool = False

    @property
    def uses_adapter(self) -> bool:
        """True if PEFT wraps the model."""
        return self.kind in ("adapter", "LoRA", "QLoRA")

    @property
    def is_quantized(self) -> bool:
        """True if the weights of the linear layers are quantized."""
        return self.base not in (HALF, FLOAT32)

    @property
    def needs_backward(self) -> bool:
        """True if the method has a backward pass; such setups are planned for comparison only."""
        return self.kind in ("LoRA", "QLoRA", "AdamW")


SETUPS = (
    *(Setup("inference", base) for base in (HALF, INT8, NF4)),
    *(Setup("low_rank", base) for base in (FLOAT32, HALF, INT8, NF4, NF4_DOUBLE)),
    Setup("low_rank, folding", INT8),
    *(Setup("full", base) for base in (FLOAT32, HALF)),
    *(Setup("norms", base) for base in (HALF, NF4)),
    *(Setup("scales", base) for base in (INT8, NF4)),
    *(Setup("adapter", base) for base in (HALF, INT8, NF4, NF4_DOUBLE)),
    *(Setup(kind, HALF, streamed=True) for kind in ("low_rank", "adapter")),
    Setup("LoRA", HALF),
    Setup("LoRA", HALF, checkpointing=True),
    Setup("QLoRA", NF4_DOUBLE),
    Setup("QLoRA", NF4_DOUBLE, checkpointing=True),
    Setup("AdamW", FLOAT32),
    Setup("AdamW", FLOAT32, checkpointing=True),
)


@dataclass(frozen=True)
class Footprint:
    """The memory of one setup in bytes.

    Args:
        moves: number of coordinates, or of trained weights.
        weights: the model's parameters and buffers on the device, including an adapter.
        state: further memory kept from step to step, including the optimizer's.
        working: memory beyond that at the peak of a step.
        passes: rows of each forward pass of a step.
        crosses: bytes of weights that are copied to the device in a step.
    """

    moves: int
    weights: int
    state: int
    working: int
    passes: tuple[int, ...]
    crosses: int = 0


# Numbers of layers of the two models from which a deeper model is extrapolated.
FEW, MORE = 2, 3


def footprints(config: PretrainedConfig, given: Assumptions, setups: Sequence[Setup]) -> dict[Setup, Footprint]:
    """Compute the memory of each setup.

    If all layers are equal, the peak of each phase of a step is linear in their number. A deep model is then traced
    with two small numbers of layers and extrapolated. Weights are always counted on the whole model.

    Raises:
        ValueError: the model cannot be traced because its forward depends on values, or an adapter does not fit it.
    """
    depth = config.num_hidden_layers
    depths = (FEW, MORE) if depth > MORE and _has_equal_layers(config, given) else (depth,)
    traced = [_trace(config if count == depth else shortened(config, count), given, setups) for count in depths]
    result = {}
    for in_float32, wrapped, group in _groups(setups):
        model, linear = _build(config, given, in_float32, wrapped)
        size = size_in_bytes(tensors(model))
        for setup in group:
            usages = [usage[_key(setup)] for usage in traced]
            usage = usages[0] if len(usages) == 1 else _extrapolated(usages[0], usages[1], depth)
            weights = size - (saved_bytes(linear.values(), setup.base) if setup.is_quantized else 0)
            crosses = 0
            if setup.streamed:
                weights, crosses = _streamed(model, len(usage.passes))
            result[setup] = _footprint(setup, weights, usage, given, crosses)
    return result


def _trace(config: PretrainedConfig, given: Assumptions, setups: Sequence[Setup]) -> dict[Any, Usage]:
    usages: dict[Any, Usage] = {}
    for in_float32, wrapped, group in _groups(setups):
        model, linear = _build(config, given, in_float32, wrapped)
        with without_values():
            fill(model)
            for setup in group:
                if _key(setup) not in usages:
                    with (
                        computed_in(linear.values(), setup.base, setup.kind != "inference")
                        if setup.is_quantized
                        else nullcontext()
                    ):
                        try:
                            usages[_key(setup)] = _usage(model, linear, setup, given)
                        except RuntimeError as error:  # for example, routing to experts depends on values
                            reason = reason_of(error)
                            raise ValueError(
                                f"model={config.model_type!r} cannot be planned, because a step of {setup.kind} does not run "
                                f"on tensors without values ({reason}); use a dense model such as Llama, OPT or GPT-2."
                            ) from None
    return usages


def _groups(setups: Sequence[Setup]) -> Iterator[tuple[bool, bool, list[Setup]]]:
    """Yield groups of setups that share a model: whether it is float32, whether it has an adapter, and the setups."""
    for in_float32, wrapped in itertools.product((False, True), repeat=2):
        group = [setup for setup in setups if (setup.base == FLOAT32, setup.uses_adapter) == (in_float32, wrapped)]
        if group:
            yield in_float32, wrapped, group


def _build(config: PretrainedConfig, given: Assumptions, in_float32: bool, wrapped: bool) -> tuple[Any, dict]:
    """Return the model, with an adapter if `wrapped`, and the layers that may be quantized."""
    model = build(config, torch.float32 if in_float32 else getattr(torch, given.dtype), given.attention)
    linear = quantizable_layers(model)
    return _with_adapter(model, given) if wrapped else model, linear


def _key(setup: Setup) -> tuple:
    """Return a key that setups share if they differ in the size of the weights alone, as with double quantization."""
    return setup.kind, NF4 if setup.base == NF4_DOUBLE else setup.base, setup.checkpointing


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
    return Usage(at_depth(few.moves, more.moves), at_depth(few.state, more.state), phases, few.passes)


def _streamed(model: Any, passes: int) -> tuple[int, int]:
    """Return the bytes on the device at a time, and those that cross to it in a step, if every weight is offloaded.

    Two layers are there, the largest of the other modules, an adapter, and what is computed and not stored.
    """
    stack = layers(base_model(model))
    inside = {module for layer in stack for module in layer.modules()}
    adapter = {p for p in model.parameters() if p.requires_grad} if is_peft(model) else set()

    def crossing(module: nn.Module) -> int:
        return size_in_bytes([p for p in module.parameters(recurse=False) if p not in adapter])

    of_layers = [sum(map(crossing, layer.modules())) for layer in stack]
    of_others = [crossing(module) for module in model.modules() if module not in inside]
    there = 2 * max(of_layers) + max(of_others) + size_in_bytes([*adapter, *model.buffers()])
    return there, passes * (sum(of_layers) + sum(of_others))


def _footprint(setup: Setup, weights: int, usage: Usage, given: Assumptions, crosses: int) -> Footprint:
    optimizer = "adamw" if setup.needs_backward else given.optimizer
    if setup.kind in ("inference", "full"):  # the seeded SGD of `full` has no state
        optimizer = "sgd"
    kept = 4 * usage.moves * OPTIMIZER_COPIES[optimizer]
    return Footprint(usage.moves, weights, usage.state + kept, max(usage.phases) - usage.state, usage.passes, crosses)


def _usage(model: Any, linear: dict[str, nn.Module], setup: Setup, given: Assumptions) -> Usage:
    if setup.kind == "inference":
        return inference(model, given)
    if setup.needs_backward:
        return backward(model, given, setup.checkpointing)
    makers: dict[str, Callable] = {
        "low_rank": lambda: _low_rank(model, linear, setup, given.rank),
        "low_rank, folding": lambda: TracedLowRank(model, given.rank, coded=list(linear.values())),
        "norms": lambda: TracedLowRank(model, 1, _vectors(model), folds=False),
        "full": lambda: TracedFull(model),
        "scales": lambda: TracedScales(model, linear, setup.base),
        "adapter": lambda: TracedAdapter(model),
    }
    return zeroth_order(model, makers[setup.kind], given)


def _low_rank(model: Any, linear: dict[str, nn.Module], setup: Setup, rank: int) -> TracedLowRank:
    if not setup.is_quantized:
        return TracedLowRank(model, rank)
    return TracedLowRank(model, rank, [f"{name}.weight" for name in linear], folds=False)


def _vectors(model: Any) -> list[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no parameter of one dimension for norms to move; plan other setups."
        )
    return names


def _with_adapter(model: Any, given: Assumptions) -> Any:
    """Add a LoRA adapter to the model with PEFT.

    Raises:
        ValueError: PEFT is not installed, or does not find the targets.
    """
    if not is_peft_available():
        raise ValueError("setups with an adapter need peft; install it with `pip install zo_hf[peft]`.")
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
