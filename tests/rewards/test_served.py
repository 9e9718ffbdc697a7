"""Learning from rewards of answers that a server generates: as in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_same_bits
from tests.rewards.runs import make_trainer, prompts
from tests.serving.runs import adapter_of, base, lora
from tests.serving.stand_in import StandIn, serving
from tests.trainer.runs import logged


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with serving(base) as found:
        yield found


def make(folder: Path, url: str | None = None, **options: Any) -> Any:
    """A trainer of rewards, with or without a server."""
    options = {"zo_fold_steps": None, "zo_eps": 0.3, "learning_rate": 0.1, "max_steps": 2} | options
    if url is not None:
        options = {"server_url": url, "server_max_loras": 2, "server_timeout": 30.0} | options
    return make_trainer(folder, lora(), **options)


def answers(stand_in: StandIn, since: int) -> list[dict[str, Any]]:
    """The requests for answers of adapters."""
    bodies = [body for path, body in stand_in.requests[since:] if path == "/v1/completions"]
    return [body for body in bodies if "prompt_logprobs" not in body]


@pytest.mark.parametrize("options", [{}, {"generations_per_prompt": 2}], ids=str)
def test_it_equals_training_in_this_process(options: dict[str, Any], stand_in: StandIn, tmp_path: Path) -> None:
    since = len(stand_in.requests)
    served = make(tmp_path / "served", stand_in.url, **options)
    served.train()
    own = make(tmp_path / "own", zo_batched_probes=False, **options)
    own.train()
    for key in ("reward", "reward_std", "completions/mean_length", "zo/projected_grad"):
        assert logged(served, key) == pytest.approx(logged(own, key)), key
    assert all(logged(served, "grad_norm"))
    assert_same_bits(adapter_of(served), adapter_of(own))
    # Every member answers its own prompts in one request.
    asked = [len(body["prompt"]) for body in answers(stand_in, since)]
    assert asked == [2 if options else 4] * 8


def test_members_share_their_random_numbers(stand_in: StandIn, tmp_path: Path) -> None:
    since = len(stand_in.requests)
    trainer = make(tmp_path, stand_in.url, temperature=0.7, top_k=20, max_steps=1)
    trainer.train()
    asked = answers(stand_in, since)
    seeds: dict[tuple[int, ...], set[int]] = {}
    for body in asked:
        (prompt,) = body["prompt"]
        seeds.setdefault(tuple(prompt), set()).add(body["seed"])
    assert len(asked) == 16 and len(seeds) == 4 and all(len(of_prompt) == 1 for of_prompt in seeds.values())
    assert len(set.union(*seeds.values())) == 4
    assert {(body["temperature"], body["top_k"]) for body in asked} == {(0.7, 20)}
    again = make(tmp_path / "again", stand_in.url, temperature=0.7, top_k=20, max_steps=1)
    again.train()
    assert_same_bits(adapter_of(again), adapter_of(trainer))


def test_evaluation_is_the_servers(stand_in: StandIn, tmp_path: Path) -> None:
    data = {"eval_dataset": prompts(5)}
    served = make(tmp_path / "served", stand_in.url, more=data, per_device_eval_batch_size=3)
    since = len(stand_in.requests)
    found = served.evaluate()
    assert [len(body["prompt"]) for body in answers(stand_in, since)] == [3, 2]
    assert not stand_in.adapters
    expected = make(tmp_path / "own", more=data, per_device_eval_batch_size=3).evaluate()
    assert found["eval_reward"] == pytest.approx(expected["eval_reward"])
    assert found["eval_completions/mean_length"] == expected["eval_completions/mean_length"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"generation_kwargs": {"min_new_tokens": 2}}, "server_url=... does not combine with generation_kwargs"),
        ({"cache_implementation": "static"}, "server_url=... does not combine with cache_implementation='static'"),
        ({"server_url": "somewhere"}, "server_url='somewhere' is not the address of a server"),
    ],
    ids=str,
)
def test_options_that_do_not_work(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        make(tmp_path, "http://127.0.0.1:1", **options)
    assert error in str(refused.value)
