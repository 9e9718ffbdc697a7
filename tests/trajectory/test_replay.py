"""The base model and the log give the trained model, bit for bit, without data and without a forward pass."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import CAUSAL_MODELS, assert_same_bits, seeded, tiny_llama, tiny_opt, weights_of
from tests.trainer.runs import SaveAt, SkipsThird, logged, make_trainer, trained, with_lora
from zo_hf.trajectory import TrajectoryError, read_trajectory, replay, verify

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"optim_args": "momentum=0.9,nesterov=True", "learning_rate": 1e-3},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-3},
    "normalized": {"zo_normalize": True, "learning_rate": 1e-4},
    "weight decay": {"weight_decay": 0.3},
    "clipped": {"max_grad_norm": 1.0, "zo_num_directions": 3, "zo_direction": "rademacher"},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "gradient_accumulation_steps": 2},
}
NEEDS_GRADIENTS = {"momentum", "adamw"}
CASES = [
    (subspace, optimizer)
    for subspace in ("low_rank", "full")
    for optimizer in OPTIMIZERS
    if subspace != "full" or optimizer not in NEEDS_GRADIENTS
]
CASES += [("adapter", optimizer) for optimizer in ("adamw", "weight decay", "clipped")]


def build(subspace: str = "low_rank", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    model = seeded(tiny_opt, dtype, seed, num_hidden_layers=1)
    return with_lora(model) if subspace == "adapter" else model


def without_forward(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    return model


IN_BF16 = [("low_rank", "sgd"), ("low_rank", "adamw"), ("full", "schedule"), ("adapter", "normalized")]


@pytest.mark.parametrize(
    ("subspace", "optimizer", "dtype"),
    [*((*case, torch.float32) for case in CASES), *((*case, torch.bfloat16) for case in IN_BF16)],
)
def test_a_replay_has_the_bits_of_the_run(tmp_path: Path, subspace: str, optimizer: str, dtype: torch.dtype) -> None:
    options = {"zo_fold_steps": 3, "max_steps": 8, "zo_subspace": subspace} | OPTIMIZERS[optimizer]
    trainer = trained(tmp_path, build(subspace, dtype), **options)
    replayed = replay(without_forward(build(subspace, dtype)), tmp_path)
    assert_same_bits(weights_of(replayed), weights_of(trainer.model))
    assert not any("forward" in module.__dict__ for module in replayed.modules())
    before = weights_of(build(subspace, dtype))
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights_of(replayed).items())


@pytest.mark.parametrize(
    ("subspace", "optimizer"),
    [("low_rank", "adamw"), ("low_rank", "normalized"), ("full", "sgd"), ("adapter", "adamw")],
)
def test_a_skipped_step_is_skipped_again(tmp_path: Path, subspace: str, optimizer: str) -> None:
    options = {"max_steps": 5, "zo_subspace": subspace, "weight_decay": 0.1} | OPTIMIZERS[optimizer]
    trainer = trained(tmp_path, build(subspace), SkipsThird, **options)
    assert [record.skipped for record in read_trajectory(tmp_path).records] == [False, False, True, False, False]
    assert_same_bits(weights_of(replay(build(subspace), tmp_path)), weights_of(trainer.model))


@pytest.mark.parametrize("architecture", CAUSAL_MODELS)
def test_every_architecture_replays(tmp_path: Path, architecture: str) -> None:
    trainer = trained(tmp_path, seeded(CAUSAL_MODELS[architecture]), max_steps=4, learning_rate=1e-3)
    replayed = replay(seeded(CAUSAL_MODELS[architecture]), tmp_path)
    assert_same_bits(weights_of(replayed), weights_of(trainer.model))


def test_patterns_and_frozen_parameters_are_respected(tmp_path: Path) -> None:
    model = build()
    model.model.decoder.layers[0].requires_grad_(False)
    trainer = trained(tmp_path, model, zo_exclude_modules=["embed_tokens", "lm_head"], max_steps=4)
    header = read_trajectory(tmp_path).header
    assert header["patterns"] == {"target": None, "exclude": ["embed_tokens", "lm_head"]}
    assert_same_bits(weights_of(replay(build(), tmp_path)), weights_of(trainer.model))
    frozen = build().requires_grad_(False)
    assert_same_bits(weights_of(replay(frozen, tmp_path)), weights_of(trainer.model))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_optimizer_of_the_users_replays(tmp_path: Path) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        vectors = [p for p in model.parameters() if p.ndim == 1]
        matrices = [model.lm_head.weight]
        return torch.optim.Adam(
            [{"params": vectors, "lr": 1e-3}, {"params": matrices, "lr": 3e-3, "betas": (0.5, 0.9)}]
        )

    model = build()
    trainer = trained(tmp_path, model, more={"optimizers": (optimizer(model), None)}, max_steps=5)
    assert_same_bits(weights_of(replay(build(), tmp_path)), weights_of(trainer.model))


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_a_replay_until_a_step_is_the_checkpoint_of_that_step(tmp_path: Path, subspace: str) -> None:
    model = build(subspace)
    options = {"max_steps": 6, "zo_fold_steps": 4, "zo_subspace": subspace, "weight_decay": 0.1}
    trained(tmp_path / "run", model, more={"callbacks": [SaveAt(3)]}, **options)
    stopped = trained(tmp_path / "stopped", build(subspace), **options | {"max_steps": 3})
    replayed = replay(build(subspace), tmp_path / "run", until=3)
    assert_same_bits(weights_of(replayed), weights_of(stopped.model))
    if subspace != "adapter":
        assert_same_bits(
            weights_of(type(model).from_pretrained(tmp_path / "run" / "checkpoint-3")), weights_of(replayed)
        )
    with pytest.raises(TrajectoryError, match="holds 6 steps"):
        replay(build(subspace), tmp_path / "run", until=7)


def test_the_records_are_what_was_logged(tmp_path: Path) -> None:
    """Against the numbers that the Trainer logged, and against the bytes as the format's table describes them."""
    options = {"lr_scheduler_type": "linear", "zo_num_directions": 2, "max_grad_norm": 1.0, "zo_rows_per_direction": 0}
    trainer = trained(tmp_path, build(), max_steps=5, **options)
    records = read_trajectory(tmp_path).records
    assert [sum(r.projected_gradients) / 2 for r in records] == logged(trainer, "zo/projected_grad")
    assert [rate for r in records for rate in r.learning_rates] == [
        rate for rate in logged(trainer, "learning_rate") for _ in range(2)
    ]
    for record, norm in zip(records, logged(trainer, "grad_norm"), strict=True):
        assert record.clip_factor == min(1.0, 1.0 / (norm + 1e-6))

    content = (tmp_path / "trajectory" / "steps.zolog").read_bytes()
    assert content[:8] == b"ZOTRAJ\r\n" and content[8:10] == b"\x01\x00"
    start = 14 + int.from_bytes(content[10:14], "little") + 4
    for index in range(5):
        step, flags, first, second = struct.unpack_from("<IBdd", content, start + index * 49)
        assert (step, flags) == (index, 0)
        assert (first + second) / 2 == logged(trainer, "zo/projected_grad")[index]
    assert len(content) == start + 5 * 49


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_thousand_steps_fit_in_64_kilobytes(tmp_path: Path, optimizer: str) -> None:
    options = {"max_steps": 1000, "zo_fold_steps": 50, "logging_steps": 1000, "zo_rows_per_direction": 0}
    options |= OPTIMIZERS[optimizer]
    trainer = trained(tmp_path, build(), **options)
    assert sum(file.stat().st_size for file in (tmp_path / "trajectory").iterdir()) < 64 * 1024
    assert_same_bits(weights_of(replay(build(), tmp_path)), weights_of(trainer.model))


# What does not fit.


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(TrajectoryError) as error:
        replay(*args, **kwargs)
    message = str(error.value)
    assert message.endswith(".") and message.count(". ") == 0 and "\n" not in message
    return message


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_another_base_model_is_refused_and_left_alone(tmp_path: Path, subspace: str) -> None:
    trained(tmp_path, build(subspace), zo_subspace=subspace)
    other = build(subspace, seed=1)
    before = weights_of(other)
    assert "its weights differ" in refusal(other, tmp_path)
    assert_same_bits(weights_of(other), before)
    assert "its weights differ" in refusal(build(subspace, torch.bfloat16), tmp_path)
    one_bit = build(subspace)
    bits = one_bit.get_parameter(next(n for n, _ in one_bit.named_parameters() if "layer_norm" in n)).data
    bits.view(torch.int32)[-1] ^= 1
    assert "its weights differ" in refusal(one_bit, tmp_path)


def test_a_base_of_another_name_is_named(tmp_path: Path) -> None:
    model = build()
    model.config._name_or_path = "first/model"
    trained(tmp_path, model)
    other = build(seed=1)
    other.config._name_or_path = "second/model"
    message = refusal(other, tmp_path)
    assert "'first/model'" in message and "'second/model'" in message
    same = build()
    same.config._name_or_path = "a/copy"
    replay(same, tmp_path)


def test_another_architecture_and_a_missing_adapter_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "opt", build())
    assert "does not have" in refusal(seeded(tiny_llama), tmp_path / "opt")
    trained(tmp_path / "lora", build("adapter"))
    assert "its adapter included" in refusal(build(), tmp_path / "lora")


def test_an_adapter_starts_where_the_run_did(tmp_path: Path) -> None:
    """PEFT draws the adapter at random, and a replay has no need of the same draw."""
    trainer = trained(tmp_path, build("adapter"))
    other = build("adapter")
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    assert_same_bits(weights_of(replay(other, tmp_path)), weights_of(trainer.model))
    (tmp_path / "trajectory" / "start.safetensors").write_bytes(b"")
    assert "cannot be read" in refusal(build("adapter"), tmp_path)


def test_the_start_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "a", build("adapter"))
    other = build("adapter")
    next(p for n, p in other.named_parameters() if "lora_" in n).data.add_(1)
    trained(tmp_path / "b", other)
    (tmp_path / "a/trajectory/start.safetensors").write_bytes(
        (tmp_path / "b/trajectory/start.safetensors").read_bytes()
    )
    assert "does not belong" in refusal(build("adapter"), tmp_path / "a")


def test_an_optimizer_that_cannot_be_rebuilt_is_named(tmp_path: Path) -> None:
    trained(tmp_path, build(), optim="adafactor")
    assert len(verify(tmp_path).records) == 4
    assert "Adafactor" in refusal(build(), tmp_path)


def test_options_that_change_in_the_run_are_noticed(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=6)
    trainer = make_trainer(tmp_path, model, more={"optimizers": (optimizer, schedule)}, max_steps=4)
    trainer.train()
    assert "options had changed by step 1" in refusal(build(), tmp_path)
    replay(build(), tmp_path, until=1)
