"""The direction and the subspace that docs/extend adds are what the text says, and the shared checks find them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import seeded
from tests.docs.pages import DOCS, blocks
from tests.methods.checks import CHECKS
from tests.methods.table import Tiny, combinations
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.rng import Stream, draw_slice
from zo_hf.subspaces import SUBSPACES

ADDED = {"direction": {"uniform": "Uniform"}, "subspace": {"gains": "Gains"}}
REGISTRIES: dict[str, dict[str, Any]] = {"direction": DISTRIBUTIONS, "subspace": SUBSPACES}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages define; it is registered until the test ends."""
    defined: dict[str, Any] = {"__name__": "extend"}
    for page in ("directions", "subspaces"):
        for block in blocks((DOCS / "extend" / f"{page}.md").read_text(encoding="utf-8")):
            if block.language == "python" and not block.given:
                exec(block.text, defined)
    for registry, added in ADDED.items():
        for name, kind in added.items():
            monkeypatch.setitem(REGISTRIES[registry], name, defined[kind])
    return defined


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("entry", [(r, name) for r, added in ADDED.items() for name in added], ids="-".join)
def test_the_shared_checks_pick_them_up(names: dict[str, Any], entry: tuple[str, str], check: str) -> None:
    found = combinations(entry)
    assert len(found) >= 6
    for combination in found:
        CHECKS[check](combination)


def test_uniform_elements_have_unit_variance(names: dict[str, Any]) -> None:
    z = draw_slice(Stream(0), "w", 0, 1 << 18, names["Uniform"]()).double()
    assert abs(float(z.mean())) < 0.01 and abs(float(z.square().mean()) - 1) < 0.01
    assert float(z.abs().max()) <= 3**0.5


def test_gains_multiply_the_rows_of_linear_layers(names: dict[str, Any]) -> None:
    model, plain = seeded(Tiny), seeded(Tiny)
    subspace = names["Gains"](model)
    subspace.attach()
    assert subspace.coordinates.keys() == {"layers.0.weight", "layers.1.weight", "head.weight"}
    for name, gain in subspace.coordinates.items():
        gain.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        plain.get_parameter(name).data.mul_(1 + gain.detach()[:, None])
    subspace.coordinates_changed()
    tokens = torch.arange(6).view(2, 3)
    assert torch.allclose(model(tokens), plain(tokens), atol=1e-6)
    folded = subspace.finish(1, {})
    assert folded is model
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
