"""The probe at the current point itself: one after another, in a batch with others, and shared out among ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded, tiny_llama
from tests.estimators.quadratic import ALONG_NOISE, EVERY_ESTIMATOR, Quadratic, engine
from tests.subspaces.helpers import EVERY_SUBSPACE, batch_for, loss_of, move_off_the_origin, prepared
from zo_hf.directions import RADEMACHER
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.subspaces import Core


@pytest.fixture(autouse=True)
def _small_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Core, "default_rank", 3)


def losses(zo: ZerothOrder, probes: list[Probe], batched: bool) -> Tensor:
    zo.evaluator.batched = batched
    closure = loss_of(zo.model, batch_for(zo.model, rows=2))
    return zo.evaluator.losses(zo.subspace, closure, probes, zo._stream, zo.distribution)


@EVERY_SUBSPACE
@pytest.mark.parametrize("estimator", [name for name, kind in ALONG_NOISE.items() if not kind.needs_tangents])
def test_all_probes_of_a_step_share_a_batch(subspace: str, estimator: str) -> None:
    model = prepared(subspace, seeded(partial(tiny_llama, num_hidden_layers=1)))
    zo = ZerothOrder(model, subspace, eps=0.02, num_directions=3, estimator=estimator)
    move_off_the_origin(zo.subspace)
    probes = zo.estimator.probes()
    one_by_one, together = losses(zo, probes, False), losses(zo, probes, True)
    assert one_by_one.std() > 1e-4
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


@EVERY_SUBSPACE
@pytest.mark.parametrize("where", [0, 2])
def test_a_clean_probe_is_the_model_itself_wherever_it_stands(subspace: str, where: int) -> None:
    """At the same bits as a perturbation of nothing, in any place among probes of other directions."""
    model = prepared(subspace, seeded(partial(tiny_llama, num_hidden_layers=1)))
    zo = ZerothOrder(model, subspace, eps=0.02, direction=RADEMACHER.name)
    move_off_the_origin(zo.subspace)
    probes = [Probe(1, 0.02), Probe(1, -0.02), Probe(0, 0.02)]
    with_clean = [*probes[:where], Probe(1, 0.0), *probes[where:]]
    together = losses(zo, with_clean, True)
    assert together[where].item() == pytest.approx(losses(zo, [Probe(0, 0.0)], False).item(), rel=1e-5)
    assert together[where].item() == pytest.approx(model(**batch_for(model, rows=2)).loss.item(), rel=1e-4)
    rest = torch.cat([together[:where], together[where + 1 :]])
    torch.testing.assert_close(rest, losses(zo, probes, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_clean_probe_draws_nothing_and_rounds_like_its_neighbors(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `full`, where a draw is a pass over the weights; the bits are those of a perturbation of size 0."""
    model = seeded(partial(tiny_llama, num_hidden_layers=1), dtype)
    zo = ZerothOrder(model, "full")
    hardly = losses(zo, [Probe(0, 1e-42)], False)
    monkeypatch.setattr(zo.subspace, "_noise", lambda *_: pytest.fail("a draw"))
    monkeypatch.setattr("zo_hf.rng.draw.draw_rows", lambda *_: pytest.fail("a draw"))
    assert torch.equal(losses(zo, [Probe(0, 0.0)], False), hardly)


@EVERY_ESTIMATOR
@pytest.mark.parametrize(("data", "sharing"), [(1, 2), (1, 4), (2, 2), (3, 1)])
def test_ranks_that_share_the_directions_find_what_one_finds(estimator: str, data: int, sharing: int) -> None:
    """Also where they evaluate different numbers of probes; all count the passes of the whole step, and log one loss."""

    class Gathered(Ranks):
        def all_gather(self, tensor: Tensor) -> Tensor:
            sent[self.grid.rank, tensor.shape] = tensor
            return torch.stack([sent.get((rank, tensor.shape), tensor) for rank in range(self.grid.world_size)])

    sent: dict[tuple[int, torch.Size], Tensor] = {}
    model = Quadratic()
    whole = engine(model, estimator, 4)
    expected = whole.estimate(model)
    whole.subspace.detach()
    engines = [
        engine(Quadratic(), estimator, 4, ranks=Gathered(Grid(data, sharing, rank))) for rank in range(data * sharing)
    ]
    for zo in engines:
        zo.model.ripple = 30.0 * (zo.ranks.grid.data_index - (data - 1) / 2)  # ranks' data differ, their mean does not
        zo.probe(zo.model)
        own = zo._sum.of_rank
        zo.finish_estimate()
        zo._sum.of_rank = own
    found = [zo.finish_estimate() for zo in engines]
    assert all(other == found[0] for other in found)
    assert found[0].projected_gradients == pytest.approx(expected.projected_gradients, rel=1e-6)
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-12)
    assert {zo.forward_passes for zo in engines} == {len(whole.estimator.probes())}
