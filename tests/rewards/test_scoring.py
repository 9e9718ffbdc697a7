"""Reward functions and reward models: what they get, and what they may return."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.conftest import assert_same_bits, seeded, tiny_llama, weights_of
from tests.rewards.runs import counts_wanted, make_trainer, odd_words, prompts, tokenizer, trained
from zo_hf.rewards.scoring import RewardError, RewardFunction, Rewards

COUNT = 3


def rewards_of(value: Any) -> torch.Tensor:
    return RewardFunction("mine", lambda **_: value)(COUNT, {})


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5, True],
        (1, 0.5, 1),
        torch.tensor([1, 0.5, 1]),
        np.array([1, 0.5, 1]),
        [torch.tensor(1.0), np.float32(0.5), np.bool_(True)],
    ],
    ids=str,
)
def test_numbers_of_many_kinds(value: Any) -> None:
    assert rewards_of(value).tolist() == [1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"'mine' returned None; let it return a list of numbers, one for every completion"),
        (1.0, r"'mine' returned 1.0; let it return a list"),
        ("yes", r"'mine' returned a str; let it return a list"),
        ([1.0, 2.0], r"'mine' returned 2 rewards for 3 completions; let it return one for each"),
        ([1.0, math.nan, 0.0], r"'mine' returned nan for completion 1; let it return a finite number"),
        ([1.0, 0.0, math.inf], r"'mine' returned inf for completion 2; let it return a finite number"),
        ([1.0, "1.0", 0.0], r"'mine' returned a str for completion 1; let it return a finite number"),
        (np.ones((3, 2)), r"'mine' returned a list for completion 0; let it return a finite number"),
    ],
    ids=str,
)
def test_refused_values(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        rewards_of(value)


def test_none_stands_for_no_rating() -> None:
    some, all_ = (lambda **_: [1.0, None, None]), (lambda **_: [2.0, None, 4.0])
    rewards = Rewards([RewardFunction("some", some), RewardFunction("all", all_)], [10.0, 1.0])
    with pytest.raises(RewardError, match="'some' and 'all' returned None for completion 1; let one of reward_funcs"):
        rewards.of(3, {})
    found = torch.tensor([[1.0, 2.0], [math.nan, 3.0]])
    assert rewards.total(found).tolist() == [12.0, 3.0]


class Raises:
    """A reward that fails in its third call, in the second step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        self.calls += 1
        if self.calls == 3:
            raise KeyError("answer")
        return odd_words(completions)


def test_nothing_is_lost(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, rewards=Raises(), **options)
    with pytest.raises(RewardError, match="the reward function 'Raises' raised KeyError: 'answer'"):
        trainer.train()
    one_step = trained(tmp_path / "one", max_steps=1, gradient_accumulation_steps=2)
    assert_same_bits(weights_of(trainer.model), weights_of(one_step.model))
    resumed = trained(tmp_path, resume=True, **options)
    assert_same_bits(
        weights_of(resumed.model), weights_of(trained(tmp_path / "three", gradient_accumulation_steps=2).model)
    )


def test_what_a_function_gets(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list:
        seen.append({"prompts": prompts, "completions": completions, "ids": completion_ids} | columns)
        return [0.0] * len(prompts)

    data = prompts(4, number=[3, 1, 4, 1], completion=["unused"] * 4)
    trained(tmp_path, rewards=reward, more={"train_dataset": data}, max_steps=1)
    (call,) = seen
    assert set(call) == {"prompts", "completions", "ids", "number", "trainer_state"}
    numbers = dict(zip(data["prompt"], data["number"], strict=True))
    assert [numbers[prompt] for prompt in call["prompts"]] == call["number"] and len(call["number"]) == 16
    assert call["prompts"][:4] == call["prompts"][:1] * 4  # answers to a prompt are next to each other
    assert [tokenizer().decode(ids, skip_special_tokens=True) for ids in call["ids"]] == call["completions"]
    assert call["trainer_state"].max_steps == 1


def test_messages(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return odd_words([message["content"] for (message,) in completions])

    texts = ["w20 w21", "w30"]
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})
    options = {"max_steps": 1, "per_device_train_batch_size": 2}
    trainer = trained(tmp_path, rewards=reward, more={"train_dataset": data}, **options)
    assert {prompt[0]["content"] for prompt, _ in seen} == set(texts)
    assert all(completion[0]["role"] == "assistant" for _, completion in seen)
    batch = trainer.data_collator([{"prompt": data[0]["prompt"]}])
    assert batch["input_ids"].tolist() == [[2, 20, 21, 3]]


async def awaited(completions: list[str], **_: Any) -> list[float]:
    return odd_words(completions)


def test_several_functions(tmp_path: Path) -> None:
    functions = [
        counts_wanted,
        functools.partial(odd_words),
        awaited,
        lambda completions, **_: [1.0] * len(completions),
    ]
    trainer = trained(tmp_path, rewards=functions, reward_weights=[2.0, 0.5, 0.5, 3.0], max_steps=1)
    (log,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    words = log["rewards/odd_words/mean"]
    assert log["rewards/awaited/mean"] == words and log["rewards/<lambda>/mean"] == 1.0
    assert log["reward"] == pytest.approx(2 * log["rewards/counts_wanted/mean"] + words + 3.0)


def classifier() -> LlamaForSequenceClassification:
    size = tiny_llama().config.to_dict() | {"num_labels": 1}
    return seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**size)), seed=3)


@pytest.mark.parametrize("form", ["path", "module"])
def test_a_reward_model(form: str, tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path / "judge")
    tokenizer().save_pretrained(tmp_path / "judge")
    given = str(tmp_path / "judge") if form == "path" else model
    more = {} if form == "path" else {"reward_processing_classes": [tokenizer(), None]}
    seen: list[tuple[str, str]] = []

    def records(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    before = weights_of(model)
    trainer = trained(tmp_path, rewards=[given, records], more=more, max_steps=1)
    texts = [tokenizer()(prompt + completion, return_tensors="pt")["input_ids"] for prompt, completion in seen]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits.item() for ids in texts]
    name = "judge" if form == "path" else "LlamaForSequenceClassification"
    log = trainer.state.log_history[0]
    assert log[f"rewards/{name}/mean"] == pytest.approx(sum(expected) / 16) and len(set(expected)) > 4
    assert log[f"rewards/{name}/std"] == pytest.approx(torch.tensor(expected).std().item(), rel=1e-4)
    assert_same_bits(weights_of(model), before)


def test_logs(tmp_path: Path) -> None:
    lengths, ended = [], []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        ended.extend(ids[-1] == 1 for ids in completion_ids)
        return [1.0] * len(completion_ids)

    trainer = trained(tmp_path, rewards=reward, max_steps=1, max_completion_length=6)
    (log, *_) = trainer.state.log_history
    expected = {"loss": -1.0, "reward": 1.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "grad_norm": 0.0}
    expected |= {"completions/mean_length": sum(lengths) / 16, "completions/clipped_ratio": 1 - sum(ended) / 16}
    expected |= {"completions/min_length": min(lengths), "completions/max_length": max(lengths)}
    expected |= {"rewards/reward/mean": 1.0, "rewards/reward/std": 0.0}
    terminated = [length for length, ends in zip(lengths, ended, strict=True) if ends]
    expected["completions/mean_terminated_length"] = sum(terminated) / len(terminated)
    assert {name: log[name] for name in expected} == expected


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, max_steps=1, log_completions=True, num_completions_to_print=2)
    said = capsys.readouterr().out
    assert "step 1" in said and "odd_words" in said and said.count("├") == 1
