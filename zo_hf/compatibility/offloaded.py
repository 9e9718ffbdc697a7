"""Conflicts with weights that accelerate keeps off the device that computes."""

from __future__ import annotations

from zo_hf.compatibility.conflict import Conflict
from zo_hf.subspaces import Full

_OFFLOADED = "weights that device_map offloads"

OFFLOADED: tuple[Conflict, ...] = (
    Conflict(
        "zo_subspace='full'",
        _OFFLOADED,
        "every step would write every offloaded weight",
        "use zo_subspace='low_rank', which writes weights only at a fold",
        lambda case: "offloaded" in case.facts and case.settings.subspace == Full.name,
    ),
    Conflict(
        "a quantized model",
        _OFFLOADED,
        "a quantized weight is offloaded without its quantization state",
        "load the model with a device_map that keeps all of it on the device, or without quantization",
        lambda case: {"offloaded", "quantized"} <= case.facts,
    ),
    Conflict(
        "torch_compile=True",
        _OFFLOADED,
        "a compiled model keeps the weights that it was traced with",
        "leave it out",
        lambda case: "offloaded" in case.facts and bool(case.argument("torch_compile")),
    ),
    Conflict(
        "fsdp=...",
        _OFFLOADED,
        "FSDP shards weights that are in memory",
        "load the model without device_map, or leave fsdp out",
        lambda case: {"offloaded", "fsdp"} <= case.facts,
    ),
    Conflict(
        "several processes",
        _OFFLOADED,
        "every process would load and write its own copy",
        "start one process, or use fsdp=... without device_map",
        lambda case: {"offloaded", "several processes"} <= case.facts,
    ),
)
