"""Reading of safetensors files: names, shapes and dtypes are compared before a tensor is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_tensors(path: Path, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Tensor]:
    """Read a file of tensors onto the CPU.

    Args:
        path: the file.
        shapes: shapes of the tensors that must be there, by name; a dimension of 0 may have any size. None reads whatever is
            there.

    Raises:
        ValueError: the file cannot be read, or a tensor is missing, of another shape or not of floating point; the message
            gives the reason as a clause.
    """
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is not a file")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name, shape in (shapes or {}).items():
                if name not in names:
                    raise ValueError(f"it lacks {name}")
                found = file.get_slice(name).get_shape()
                if len(found) != len(shape) or any(
                    size not in (0, own) for size, own in zip(shape, found, strict=True)
                ):
                    raise ValueError(f"{name} has the shape {found} and not {list(shape)}")
            return {name: file.get_tensor(name) for name in (names if shapes is None else shapes)}
    except (OSError, SafetensorError) as error:
        raise ValueError("it cannot be read") from error
