"""On a GPU that is not there: weights of the CPU's memory are copied to it layer by layer, and no operation mixes the two."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload

from tests.conftest import causal_batch, seeded, tiny_opt
from tests.gpu.fake_cuda import CUDA, fake_cuda
from tests.offload.conftest import Timeline
from tests.subspaces.helpers import loss_of
from zo_hf import ZerothOrder
from zo_hf.evaluation.model_loss import LossChecks
from zo_hf.rng import philox_wide


@pytest.mark.parametrize("subspace", ["low_rank", "core", "norms"])
def test_a_step_and_a_fold_compute_on_the_device(
    cuda: Timeline, monkeypatch: pytest.MonkeyPatch, subspace: str
) -> None:
    monkeypatch.setattr(philox_wide, "ROUNDS", 1)  # the others do the same
    model = seeded(tiny_opt, torch.bfloat16, num_hidden_layers=3)
    with fake_cuda() as counts:
        cpu_offload(model, CUDA)
        batch = {name: tensor.to(CUDA) for name, tensor in causal_batch().items()}
        options = {} if subspace == "norms" else {"fold_steps": 2, "rank": 4}
        zo = ZerothOrder(model, subspace, rows_per_direction=0, batched_probes=True, seed=0, **options)
        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-3))
        assert {coordinate.device for coordinate in zo.subspace.coordinates.values()} == {CUDA}
        checks = LossChecks(is_known=True)
        loss = loss_of(model, batch, checks=checks)
        for _ in range(3):
            counts.clear()
            zo.estimate(loss)
            assert counts.launches["mm"] + counts.launches["addmm"] > 6 * 3
            optimizer.step()
        cuda.told.clear()
        zo.estimate(loss)
        assert cuda.told.count("copies waits for left") == 3, "each layer crosses once"
        state = model.state_dict()
        assert {tensor.device.type for tensor in state.values()} <= {"cpu", "meta", "cuda"}
        assert zo.finish() is model
        assert all(parameter.is_meta for parameter in model.parameters())
