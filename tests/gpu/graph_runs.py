"""Steps of a tiny model with graphs of its forward passes, and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import causal_batch, seeded
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss


class Run:
    """An engine around a tiny model, which takes one step after another."""

    def __init__(
        self,
        build: Callable[..., nn.Module],
        graph: bool,
        subspace: str = "low_rank",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.device = device
        self.inner: Any = seeded(build, dtype).to(device)
        self.model = _with_lora(self.inner) if subspace == "adapter" else self.inner
        folds = {"fold_steps": 2} if subspace in ("low_rank", "core") else {}
        ranks = {"rank": 4} if folds else {}
        options = {"rows_per_direction": 0, "batched_probes": True} | options
        self.zo = ZerothOrder(self.model, subspace=subspace, cuda_graph=graph, **folds, **ranks, **options)
        self.optimizer = self.zo.prepare(torch.optim.SGD(self.zo.coordinates(), lr=1e-2, momentum=0.9))
        self.checks = LossChecks()
        self.losses: list[float] = []

    def step(self, seed: int = 0, length: int = 8) -> None:
        batch = padded(seed, length, self.device)
        loss = ModelLoss(self.model, self.inner, batch, lambda x: self.model(**x).loss, checks=self.checks)
        estimate = self.zo.estimate(loss)
        self.optimizer.step()
        self.losses += [estimate.loss, *estimate.projected_gradients]
        assert all(torch.equal(batch[name], given) for name, given in padded(seed, length, self.device).items())

    def evaluate(self) -> None:
        with torch.no_grad():
            self.losses.append(float(self.model(**padded(9, 8, self.device)).loss))

    def bits(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def padded(seed: int, length: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch with padding, for which a model needs a mask with a graph and without."""
    batch = causal_batch(4, length, seed)
    batch["attention_mask"][1:, 0] = 0
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
