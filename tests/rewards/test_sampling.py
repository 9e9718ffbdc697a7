"""Random numbers of sampling: Gumbel's law, shared by members, and the same wherever a row is."""

from __future__ import annotations

import math

import pytest
import torch

from tests.rewards.runs import config
from zo_hf.rewards.sampling import Gumbel, SharedNoise, sampler
from zo_hf.rng import Purpose, Stream
from zo_hf.rng.draw import draw_slice
from zo_hf.rng.global_generators import GlobalGenerators

ROWS, VOCABULARY = 3, 1000


def noise(prompts: list[int], step: int = 0, seed: int = 0, position: int = 0) -> torch.Tensor:
    ids = torch.zeros(len(prompts), 4 + position, dtype=torch.int64)
    return SharedNoise(seed, step, prompts, 4)(ids, torch.zeros(len(prompts), VOCABULARY))


def test_law() -> None:
    values = draw_slice(Stream(0, purpose=Purpose.SAMPLING), "gumbel", 0, 200_000, Gumbel()).double()
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    below = [(values <= level).double().mean().item() for level in (-1.0, 0.0, 1.0, 3.0)]
    assert below == pytest.approx([math.exp(-math.exp(-level)) for level in (-1.0, 0.0, 1.0, 3.0)], abs=0.005)


def test_extreme_bits() -> None:
    packed = torch.tensor([[0, -1]])  # the words 0, 0, 2**32 - 1 and 2**32 - 1
    largest, _, smallest, _ = Gumbel.decode(packed).tolist()
    assert largest == pytest.approx(33 * math.log(2), abs=1e-5)  # -log(2**-33)
    assert smallest == pytest.approx(-math.log(24 * math.log(2)), abs=1e-5)


def test_a_row_has_the_noise_of_its_prompt() -> None:
    found = noise([7, 2, 7])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(found[1], noise([2])[0])
    for other in (noise([2], step=1), noise([2], seed=1), noise([2], position=1)):
        assert not torch.equal(found[1], other[0])


def test_it_draws_no_global_random_number() -> None:
    before = GlobalGenerators.now(torch.device("cpu"))
    noise([1])
    assert not before.have_moved()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.3},
    ],
)
def test_tokens_have_the_probabilities_of_the_options(options: dict) -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, -1.0])
    logits = scores / options["temperature"]
    probability = logits.softmax(0)
    kept = torch.ones(4, dtype=torch.bool)
    if "top_k" in options:
        kept[2:] = False
    if "top_p" in options:  # the smallest set that has 0.7
        kept = probability.cumsum(0) - probability < 0.7
    if "min_p" in options:
        kept = probability >= 0.3 * probability.max()
    expected = logits.masked_fill(~kept, -torch.inf).softmax(0)
    prompts = list(range(3000))
    processors = sampler(config("unused", **options), 0, prompts, 1)
    chosen = processors(torch.zeros(len(prompts), 1, dtype=torch.int64), scores.repeat(len(prompts), 1)).argmax(1)
    assert chosen.bincount(minlength=4) / len(prompts) == pytest.approx(expected.numpy(), abs=0.035)
    assert not set(chosen.tolist()) - set(kept.nonzero().flatten().tolist())


def test_temperature_0_takes_the_likeliest() -> None:
    assert not sampler(config("unused"), 0, [0], 1)
