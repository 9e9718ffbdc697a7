"""Checkpoints in the middle of a cycle, replays, and small networks in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from transformers import Trainer

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.rules.cocd.helpers import regression
from tests.trainer.runs import SaveAt, logged, make_trainer, trained, with_lora
from zo_hf import ZOConfig
from zo_hf.engine import ZerothOrder
from zo_hf.trajectory import replay

SETUPS: dict[str, dict[str, Any]] = {
    "full": {"zo_subspace": "full", "zo_target_modules": r".*(norm|bias).*"},
    "norms": {"zo_subspace": "norms"},
    "low_rank": {"zo_rank": 1, "zo_fold_steps": 4, "zo_target_modules": r".*layers\.0.*q_proj.*"},
    "adapter": {"zo_subspace": "adapter"},
}
COMMON = {
    "zo_estimator": "coordinate",
    "zo_rule": "cocd",
    "zo_num_directions": 7,
    "zo_cocd_decay": 0.9,
    "zo_eps": 0.05,
    "learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "zo_batched_probes": False,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
}


def model_for(way: str) -> torch.nn.Module:
    model = seeded(tiny_opt, num_hidden_layers=1)
    return with_lora(model, r=1, target_modules=["q_proj"]) if way == "adapter" else model


@pytest.mark.parametrize(
    ("way", "memory"), [("full", None), ("full", 10), ("norms", 10), ("low_rank", 10), ("adapter", None)]
)
def test_a_run_resumed_in_the_middle_of_a_cycle_ends_at_the_same_bits(
    way: str, memory: int | None, tmp_path: Path
) -> None:
    options = COMMON | SETUPS[way] | {"zo_cocd_memory": memory, "zo_coordinate_order": "permuted"}
    whole = trained(tmp_path / "a", model_for(way), more={"callbacks": [SaveAt(3)]}, **options)
    assert whole.state.log_history[2]["zo/cycles"] % 1, "not at the end of a cycle"
    assert (tmp_path / "a/checkpoint-3/zo_rule.safetensors").exists()
    resumed = trained(tmp_path / "b", model_for(way), resume=str(tmp_path / "a/checkpoint-3"), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert logged(resumed, "loss")[-3:] == logged(whole, "loss")[-3:]
    again = replay(model_for(way), tmp_path / "a")
    assert_same_bits(weights_of(again), weights_of(whole.model))
    assert not all(torch.equal(a, b) for a, b in zip(model_for(way).parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_the_log_alone_resumes_too(tmp_path: Path) -> None:
    options = COMMON | SETUPS["full"] | {"save_only_trajectory": True}
    whole = trained(tmp_path / "a", model_for("full"), more={"callbacks": [SaveAt(3)]}, **options)
    resumed = trained(tmp_path / "b", model_for("full"), resume=str(tmp_path / "a/checkpoint-3"), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize(
    "option", [{"zo_cocd_decay": 0.8}, {"zo_cocd_memory": 9}, {"zo_coordinate_order": "permuted"}]
)
def test_another_setting_does_not_resume(option: dict[str, Any], tmp_path: Path) -> None:
    options = COMMON | SETUPS["norms"] | {"max_steps": 2}
    trained(tmp_path / "a", model_for("norms"), more={"callbacks": [SaveAt(1)]}, **options)
    with pytest.raises(ValueError, match=f"{next(iter(option))}.*resume with the same value"):
        trained(tmp_path / "b", model_for("norms"), resume=str(tmp_path / "a/checkpoint-1"), **options | option)


def test_the_engine_resumes_from_its_numbers_and_the_rules() -> None:
    def start(model: torch.nn.Module) -> tuple[ZerothOrder, torch.optim.Optimizer]:
        zo = ZerothOrder(model, "full", eps=0.01, num_directions=3, estimator="coordinate", rule="cocd", cocd_memory=8)
        return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.05))

    model, loss = regression(torch.float32)
    zo, optimizer = start(model)
    for step in range(12):
        if step == 7:
            weights, numbers, remembered = weights_of(model), zo.state_dict(), zo.rule.state()
        zo.estimate(loss)
        optimizer.step()
    other, other_loss = regression(torch.float32)
    other.load_state_dict(weights)
    zo, optimizer = start(other)
    zo.load_state_dict(numbers)
    zo.rule.load_state(remembered)
    for _ in range(5):
        zo.estimate(other_loss)
        optimizer.step()
    assert torch.equal(parameters_to_vector(other.parameters()), parameters_to_vector(model.parameters()))


class Small(torch.nn.Module):
    """A network that a Trainer takes: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x).squeeze(-1) - labels).square().mean()}


def rows(size: int = 64) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row[0] * row[1]} for row in x]


@pytest.mark.slow
@pytest.mark.parametrize(("users", "lr", "steps"), [(False, 0.16, 115), (True, 0.6, 60)])
def test_a_small_network_learns_in_a_trainer(users: bool, lr: float, steps: int, tmp_path: Path) -> None:
    options = {"zo_subspace": "full", "zo_num_directions": 25, "max_steps": steps, "learning_rate": lr}
    options |= {"zo_batched_probes": "auto", "lr_scheduler_type": "constant", "weight_decay": 0.0}
    model = seeded(Small)
    more: dict[str, Any] = {"train_dataset": rows(), "eval_dataset": rows()}
    if users:
        groups = [{"params": model.net[0].parameters(), "lr": lr}, {"params": model.net[2].parameters(), "lr": 0.0}]
        more["optimizers"] = (torch.optim.SGD(groups), None)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, more=more, **COMMON | {"per_device_train_batch_size": 64} | options)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < (0.75 if users else 0.3) * losses[0]
    assert logged(trainer, "zo/cycles")[-1] == pytest.approx(steps * 25 / 49)
    assert logged(trainer, "zo/forward_passes")[-1] == steps * 50
    assert torch.equal(model.net[2].weight, before["net.2.weight"]) is users
    assert isinstance(trainer, Trainer) and isinstance(trainer.args, ZOConfig)
