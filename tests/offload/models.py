"""Tiny models of which accelerate keeps weights in memory or on the disk, as users get them, and the same models in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.conftest import seeded, tiny_opt
from zo_hf.offload import offloaded_weights


def saved(folder: Path, build: Any = tiny_opt, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A folder with a seeded model."""
    seeded(build, dtype, **options).save_pretrained(folder)
    return folder


def _kind(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM if (folder / "config.json").read_text().count("T5") else AutoModelForCausalLM


def in_memory(folder: Path) -> nn.Module:
    return _kind(folder).from_pretrained(folder)


def on_disk(folder: Path, device_map: Any = None) -> nn.Module:
    """The model, all of it read from its own files unless a device map says otherwise."""
    return _kind(folder).from_pretrained(
        folder, device_map=device_map or {"": "disk"}, offload_folder=str(folder.parent / "offload")
    )


def layers_on_disk(folder: Path) -> nn.Module:
    """The model with its layers alone on the disk."""
    parts = ("embed_tokens", "embed_positions", "final_layer_norm")
    device_map: dict[str, str] = {f"model.decoder.{part}": "cpu" for part in parts}
    return on_disk(folder, device_map | {"lm_head": "cpu", "model.decoder.layers": "disk"})


def as_arrays(folder: Path) -> nn.Module:
    """The model in accelerate's own format, one array a weight in an offload folder."""
    return disk_offload(in_memory(folder), folder.parent / "arrays", execution_device=torch.device("cpu"))


def beside(folder: Path) -> nn.Module:
    """The model in the CPU's memory, as a GPU would see it."""
    return cpu_offload(in_memory(folder), execution_device=torch.device("cpu"))


WAYS: dict[str, Callable[[Path], nn.Module]] = {
    "all on the disk": on_disk,
    "layers on the disk": layers_on_disk,
    "arrays": as_arrays,
    "in memory": beside,
}


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and persistent buffers, offloaded ones included, by every one of their names."""
    offloaded = offloaded_weights(model)
    state = model.state_dict(keep_vars=True)
    return {n: (offloaded[n].value() if n in offloaded else t.detach()).clone() for n, t in state.items()}
