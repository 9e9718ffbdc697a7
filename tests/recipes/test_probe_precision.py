"""The measurement of rounding, on tiny models."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import causal_batch, seeded, tiny_bert, tiny_llama


def of_classes() -> dict[str, Any]:
    return causal_batch() | {"labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("subspace", ["low_rank", "LoRA"])
@pytest.mark.parametrize(("build", "batch"), [(tiny_llama, causal_batch), (tiny_bert, of_classes)])
def test_a_finer_dtype_rounds_less_and_float32_not_at_all(
    recipe: ModuleType, build: Any, batch: Any, subspace: str, tmp_path: Path
) -> None:
    found = {}
    for dtype in ("bfloat16", "float16", "float32"):
        (found[dtype],) = recipe.measured("tiny", seeded(build), batch(), dtype, subspace, [1e-2], 4)
    assert found["float32"].rounding == 0.0 and found["float32"].loss == 0.0
    assert 0.0 < 3 * found["float16"].rounding < found["bfloat16"].rounding
    recipe.draw(list(found.values()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
