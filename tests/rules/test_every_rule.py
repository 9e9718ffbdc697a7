"""What holds for every rule that is registered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.rules.helpers import EVERY_RULE, engine, gradients, linear_task, options_of, steps
from tests.trainer.runs import SaveAt, SkipsThird, logged, trained
from zo_hf import ZOTrainer, checkpoint
from zo_hf.rules import RULES
from zo_hf.trajectory import read_trajectory, replay

# Where a step is as long as the learning rate says, whatever the loss, it has to be small at the end.
LEARNING_RATES = {"sign": 2e-2, "muon": 1e-2, "power_iteration": 1e-2}


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    return seeded(tiny_opt, dtype, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("rule", "subspace"), [*((rule, "low_rank") for rule in RULES), ("sign", "full"), ("cocd", "full")]
)
def test_a_quadratic_loses_nine_tenths_of_its_loss(rule: str, subspace: str) -> None:
    model, loss = linear_task()
    before = loss().item()
    zo, optimizer = engine(model, rule, LEARNING_RATES.get(rule, 5e-2), subspace)
    steps(zo, optimizer, loss, 100)
    zo.finish()
    assert loss().item() < 0.1 * before


@EVERY_RULE
def test_the_forward_passes_are_those_that_were_made(rule: str) -> None:
    model, loss = linear_task()
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss()

    zo, optimizer = engine(model, rule)
    expected = 0
    for _ in range(3):
        expected += zo.forward_passes_per_step
        steps(zo, optimizer, closure, 1)
        assert calls == zo.forward_passes == expected


@EVERY_RULE
def test_a_step_that_is_not_finite_leaves_no_trace(rule: str) -> None:
    model, loss = linear_task()
    zo, optimizer = engine(model, rule, options=dict.fromkeys(set(RULES[rule].uses) & {"momentum"}, 0.9))
    steps(zo, optimizer, loss, 3)
    recorded = []
    zo.on_step = recorded.append
    before = {n: c.detach().clone() for n, c in zo.subspace.coordinates.items()} | zo.rule.state()
    estimate = zo.estimate(lambda: loss() * math.nan)
    optimizer.step()
    assert not estimate.is_finite and zo.skipped_steps == 1 and gradients(zo) == {}
    assert_same_bits({n: c.detach().clone() for n, c in zo.subspace.coordinates.items()} | zo.rule.state(), before)
    assert recorded[0].skipped and len(recorded[0].projected_gradients) == zo.numbers
    steps(zo, optimizer, loss, 1)
    assert len(recorded[1].projected_gradients) == zo.numbers


@EVERY_RULE
def test_the_state_is_all_there_is(rule: str) -> None:
    """A rule that gets another's state makes the other's next gradient, on either side of a fold."""
    for done in (5, 8):
        model, loss = linear_task()
        first, optimizer = engine(model, rule, fold_steps=8)
        steps(first, optimizer, loss, done)
        second, _ = engine(linear_task()[0], rule, fold_steps=8)
        second.rule.load_state({name: tensor.clone() for name, tensor in first.rule.state().items()})
        second.step = first.step
        chosen = [1.0] * bool(first.rule.candidates)
        numbers = [0.5 * i for i in range(1, first.numbers - len(chosen) + 1)] + chosen
        for zo in (first, second):
            zo.apply(numbers, skipped=False)
        assert_same_bits(gradients(second), gradients(first))
        assert_same_bits(second.rule.state(), first.rule.state())


def test_a_run_goes_on_with_the_same_options_only() -> None:
    for rule, kind in RULES.items():
        state = {"settings": engine(linear_task()[0], rule, fold_steps=0)[0].saved_settings()}
        checkpoint.check_settings(engine(linear_task()[0], rule, fold_steps=0)[0], state, Path("saved"))
        for name in kind.uses:
            other = {name: options_of(rule, every=True)[f"zo_{name}"]}
            with pytest.raises(ValueError, match=f"saved was written with zo_{name}="):
                checkpoint.check_settings(
                    engine(linear_task()[0], rule, options=other, fold_steps=0)[0], state, Path("saved")
                )


# In a Trainer's run.

RUNS: dict[str, dict[str, Any]] = {
    "with tensors": {
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
    },
    "in kilobytes": {
        "save_only_trajectory": True,
        "max_grad_norm": 1.0,
        "zo_max_projected_grad": 1.0,
        "zo_normalize": True,
        "zo_batched_probes": True,
        "dtype": torch.bfloat16,
    },
}


@EVERY_RULE
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_and_replays_with_its_bits(tmp_path: Path, rule: str, name: str) -> None:
    """With every option of the rule, from a checkpoint between two folds, and from the log alone."""
    options = {"max_steps": 7, "zo_fold_steps": 4, "learning_rate": 1e-3} | options_of(rule, every=True) | RUNS[name]
    dtype = options.pop("dtype", torch.float32)
    if RULES[rule].candidates:
        options["max_grad_norm"] = 0.0  # refused
    kind = SkipsThird if name == "with tensors" else ZOTrainer
    whole = trained(tmp_path / "whole", build(dtype), kind, more={"callbacks": [SaveAt(6)]}, **options)
    expected = weights_of(whole.model)
    assert any(not torch.equal(expected[n], w) for n, w in weights_of(build(dtype)).items())
    assert logged(whole, "zo/skipped_steps")[-1] == (kind is SkipsThird)

    resumed = trained(tmp_path / "on", build(dtype), kind, resume=str(tmp_path / "whole/checkpoint-6"), **options)
    assert_same_bits(weights_of(resumed.model), expected)
    for key in ("loss", "zo/projected_grad", "zo/forward_passes"):
        assert logged(resumed, key)[6:] == logged(whole, key)[6:], key

    replayed = build(dtype)
    replayed.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    assert_same_bits(weights_of(replay(replayed, tmp_path / "whole")), expected)
    settings = read_trajectory(tmp_path / "whole").header["settings"]
    assert {option: settings[option] for option in options_of(rule, every=True)} == options_of(rule, every=True)
