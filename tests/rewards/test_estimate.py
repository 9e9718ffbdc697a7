"""A step against a reference that writes every member's weights by hand, and generates with each alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import CAUSAL_MODELS, seeded
from tests.rewards.runs import make_trainer, odd_words, prompts, tokenizer
from tests.trainer.runs import At, with_lora
from zo_hf.engine import ZerothOrder
from zo_hf.rewards import EvolutionTrainer

EPS, PAIRS, PROMPTS, LENGTH = 0.1, 3, 6, 4
WORDS = tokenizer()


def directions(zo: ZerothOrder) -> list[dict[str, torch.Tensor]]:
    """The directions of the first step, by coordinate."""
    (block,) = list(zo.subspace.coordinate_blocks)
    flat = [block.direction(zo._stream(i), zo.distribution).clone() for i in range(PAIRS)]
    return [{name: block.layout.view(z, name) for name in zo.subspace.coordinates} for z in flat]


def with_weights_of(model: nn.Module, zo: ZerothOrder, z: dict[str, torch.Tensor], scale: float) -> nn.Module:
    """A copy of the model whose weights are those of a member."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name not in z:
            continue
        if name in getattr(zo.subspace, "factored", {}):
            moved = z[name] @ zo.subspace.basis(name).T
            moved = moved.T if zo.subspace.factored[name].transposed else moved
            parameter.data += scale * moved.reshape(parameter.shape)
        else:
            parameter.data += scale * z[name]
    return model


def reward_alone(model: nn.Module, prompt: str) -> float:
    ids = torch.tensor([WORDS(prompt)["input_ids"]])
    config = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **config)[0, ids.shape[1] :]
    (reward,) = odd_words([WORDS.decode(found, skip_special_tokens=True)])
    return reward


def scaled(fitness: str, rewards: list[float]) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    if fitness == "z_score":
        return ((values - values.mean()) / (values.std() + 1e-4) * EPS).tolist()
    if fitness == "centered_ranks":
        return (
            ((values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2 + 0.0)
            .div(len(values) - 1)
            .sub(0.5)
            .mul(EPS)
            .tolist()
        )
    return values.tolist()


def first_step(trainer: EvolutionTrainer) -> dict[str, Any]:
    """The coordinates after the first step, its directions, and the numbers that it has logged."""
    before = copy.deepcopy(trainer.model)
    found: dict[str, Any] = {}

    def look(state: Any, **kwargs: Any) -> None:
        zo = trainer.zo
        found["moved"] = {name: p.detach().clone() for name, p in zo.subspace.coordinates.items()}

    make = trainer.create_optimizer

    def create(*args: Any) -> Any:
        optimizer = make(*args)
        found["z"] = directions(trainer.zo)
        found["start"] = {name: p.detach().clone() for name, p in trainer.zo.subspace.coordinates.items()}
        found["members"] = [
            with_weights_of(before, trainer.zo, z, sign * EPS) for z in found["z"] for sign in (1.0, -1.0)
        ]
        return optimizer

    trainer.create_optimizer = create
    trainer.add_callback(At(None, look))
    trainer.train()
    return found


@pytest.mark.parametrize(
    ("architecture", "adapter", "fitness", "per_prompt"),
    [
        ("llama", False, "z_score", 6),
        ("gpt2", False, "centered_ranks", 6),
        ("opt", False, "raw", 6),
        ("mixtral", False, "z_score", 2),
        ("llama", True, "raw", 4),
    ],
)
def test_a_step(architecture: str, adapter: bool, fitness: str, per_prompt: int, tmp_path: Path) -> None:
    model = seeded(CAUSAL_MODELS[architecture])
    model.generation_config.eos_token_id = 1
    model = with_lora(model) if adapter else model
    options: dict[str, Any] = {"population": 2 * PAIRS, "generations_per_prompt": per_prompt, "fitness": fitness}
    options |= {"max_steps": 1, "per_device_train_batch_size": PROMPTS, "learning_rate": 1.0, "zo_eps": EPS}
    options |= {"zo_fold_steps": 0} if not adapter else {"zo_fold_steps": None}
    data = prompts(PROMPTS)
    trainer = make_trainer(tmp_path, model, more={"train_dataset": data}, **options)
    order = [row["prompt"] for batch in trainer.get_train_dataloader() for row in map(dict, _rows(batch))]
    found = first_step(trainer)

    slopes = torch.zeros(PAIRS, dtype=torch.float64)
    total = 0.0
    for number, prompt in enumerate(order):
        pairs = [(number * (per_prompt // 2) + i) % PAIRS for i in range(per_prompt // 2)]
        members = [2 * pair + sign for pair in sorted(pairs) for sign in (0, 1)]
        rewards = [reward_alone(found["members"][member], prompt) for member in members]
        total += sum(rewards)
        for value, member in zip(scaled(fitness, rewards), members, strict=True):
            slopes[member // 2] -= value * (1 if member % 2 == 0 else -1)
    slopes *= 2 * PAIRS / per_prompt / PROMPTS / (2 * EPS)
    for name, moved in found["moved"].items():
        gradient = sum(c * z[name].double() for c, z in zip(slopes.tolist(), found["z"], strict=True)) / PAIRS
        torch.testing.assert_close(moved, (found["start"][name] - gradient).float(), atol=1e-5, rtol=1e-4)
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(total / PROMPTS / per_prompt) == -log["loss"]
    assert slopes.abs().max() > 0.01


def _rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in batch["prompts"]]
