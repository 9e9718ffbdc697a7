"""E‖ĝ‖² is what the derivation says, for as many directions as rows, for four, and for one.

With the shares ℓ_g of G groups, d coordinates and the fourth moment κ of z's elements,

    E‖ĝ‖² = Σ_g (d + κ − 2)·‖∇ℓ_g‖² + ‖∇L‖²        κ = 3 for normal numbers, 1 for signs
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from tests.conftest import seeded
from tests.subspaces.helpers import loss_of, sgd
from tests.unbiased.losses import CLASSES, bert, llama, padded
from tests.unbiased.spaces import NORMS
from zo_hf.engine import ZerothOrder

ROWS, DRAWS = 8, 150
FOURTH_MOMENTS = {"gaussian": 3, "rademacher": 1}
# Most rows have one label, so that their gradients agree and the number of directions matters.
CASES = {
    "gaussian": (llama, padded(torch.ones(ROWS, 6, dtype=torch.long), in_front=True, rows=ROWS)),
    "rademacher": (
        lambda: bert(BertForSequenceClassification, num_labels=CLASSES),
        padded(torch.arange(ROWS) // 7, rows=ROWS),
    ),
}


def shares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Each row's share of the loss, (ROWS,), from a forward pass over it alone."""
    targets = batch["labels"][:, 1:] if batch["labels"].ndim == 2 else batch["labels"][:, None]
    counts = targets.ne(-100).sum(1)
    each = [model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss for row in range(ROWS)]
    return torch.stack(each) * counts / counts.sum()


def gradients(zo: ZerothOrder, batch: dict[str, Tensor]) -> Tensor:
    """Those of the rows' shares, (ROWS, d)."""
    with zo.subspace.differentiable() as leaves:
        each = [torch.autograd.grad(share, leaves, retain_graph=True) for share in shares(zo.model, batch)]
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])


@pytest.mark.parametrize("groups", [1, 4, ROWS])
@pytest.mark.parametrize("direction", CASES)
def test_it_is_as_derived(direction: str, groups: int) -> None:
    build, batch = CASES[direction]
    model = seeded(build)
    options = {"rows_per_direction": ROWS // groups if groups > 1 else 0, "noise_scale_steps": 0, "eps": 3e-3}
    zo = ZerothOrder(model, "norms", target_modules=NORMS, direction=direction, seed=0, **options)
    optimizer, loss = sgd(zo, 0.0), loss_of(model, batch)
    each = gradients(zo, batch)

    def expected(of_groups: int) -> float:
        own = each.view(of_groups, ROWS // of_groups, -1).sum(1).square().sum()
        factor = zo.subspace.dimension + FOURTH_MOMENTS[direction] - 2
        return (factor * own + each.sum(0).square().sum()).item()

    assert expected(1) > 1.5 * expected(4) and expected(4) > 1.2 * expected(ROWS)
    squares = torch.zeros(DRAWS, dtype=torch.float64)
    for draw in range(DRAWS):
        assert len(zo.estimate(loss).projected_gradients) == groups
        squares[draw] = sum(c.grad.square().sum() for c in zo.subspace.coordinates.values())
        optimizer.step()
    error = squares.std() / DRAWS**0.5
    assert error < 0.15 * expected(groups)
    assert abs(squares.mean() - expected(groups)) < 3 * error
