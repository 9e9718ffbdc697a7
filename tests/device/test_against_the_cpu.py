"""A device draws the CPU's noise and takes the CPU's steps, to the rounding of its own arithmetic.

`ZO_HF_TEST_DEVICE=cuda` in the environment makes the device a GPU. Without it, the device is the CPU once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_llama, weights_of
from tests.methods.table import DEVICE, Combination, Subject, one_for_every_entry, subject
from tests.trainer.runs import SaveAt, logged, trained
from zo_hf import ZOTrainer
from zo_hf.directions import ELEMENTWISE, RADEMACHER, Elementwise
from zo_hf.rng import Stream, draw_half_words, draw_slice
from zo_hf.trajectory import replay

STREAM = Stream(seed=3, step=4, direction=1)
CPU = torch.device("cpu")
#: Elements across several tiles of any device.
MANY = 1 << 22


def test_random_bits_are_those_of_the_cpu() -> None:
    assert torch.equal(draw_half_words(STREAM, "w", 5, MANY, DEVICE).cpu(), draw_half_words(STREAM, "w", 5, MANY))


@pytest.mark.parametrize("distribution", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_noise_is_that_of_the_cpu(distribution: Elementwise) -> None:
    here = draw_slice(STREAM, "w", 5, MANY, distribution, DEVICE).cpu()
    expected = draw_slice(STREAM, "w", 5, MANY, distribution)
    if distribution is RADEMACHER:
        assert torch.equal(here, expected)
    torch.testing.assert_close(here, expected, rtol=1e-6, atol=1e-6)


def after(combination: Combination, device: torch.device) -> Subject:
    it = subject(combination, dtype=torch.float64, device=device)
    for _ in range(5):
        it.step()
    return it


@pytest.mark.parametrize("combination", one_for_every_entry(), ids=str)
def test_steps_are_those_of_the_cpu(combination: Combination) -> None:
    """In float64, where the order of a sum changes too little to tell two losses apart that a rule compares."""
    here, there = after(combination, DEVICE), after(combination, CPU)
    for numbers, expected in zip(here.numbers, there.numbers, strict=True):
        assert numbers == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
    expected_bits = there.bits()
    for name, tensor in here.bits().items():
        assert tensor.device.type == DEVICE.type, name
        torch.testing.assert_close(tensor.cpu(), expected_bits[name], rtol=1e-3, atol=1e-5)


def run(folder: Path, dtype: torch.dtype, **options: Any) -> ZOTrainer:
    return trained(folder, seeded(tiny_llama, dtype), **{"use_cpu": DEVICE.type == "cpu", "max_steps": 7} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_resumes_and_replays_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = run(tmp_path / "run", dtype, more={"callbacks": [SaveAt(4)]})
    resumed = run(tmp_path / "again", dtype, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    replayed = replay(seeded(tiny_llama, dtype).to(DEVICE), tmp_path / "run")
    assert_same_bits(weights_of(replayed), weights_of(whole.model))


def test_losses_of_a_run_are_those_of_the_cpu(tmp_path: Path) -> None:
    here, there = run(tmp_path / "here", torch.float32), run(tmp_path / "there", torch.float32, use_cpu=True)
    assert logged(here, "loss") == pytest.approx(logged(there, "loss"), rel=1e-4)
    assert next(here.model.parameters()).device.type == DEVICE.type
