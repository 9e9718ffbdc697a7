"""Rewards of answers: reward functions, called as TRL's GRPOTrainer calls them, and reward models."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from zo_hf.reason import reason_of
from zo_hf.rewards.prompts import is_conversation


class RewardError(RuntimeError):
    """Raised if a reward function fails, or returns something else than one finite number for every answer."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward function.

    Args:
        name: its name in logs.
        call: called with `prompts`, `completions`, `completion_ids`, `trainer_state` and the data set's other columns, all
            by keyword.
    """

    name: str
    call: Callable[..., Any]

    def __call__(self, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return the rewards of `count` answers, (count,), float64; NaN where the function has returned None.

        Raises:
            RewardError: it fails, or returns something else.
        """
        try:
            found = self.call(**arguments)
            if inspect.isawaitable(found):
                found = _awaited(found)
        except Exception as error:
            reason = reason_of(error)
            raise RewardError(
                f"the reward function {self.name!r} raised {type(error).__name__}: {reason}; correct it."
            ) from error
        if isinstance(found, Tensor | np.ndarray):
            found = found.tolist()
        if not isinstance(found, Sequence) or isinstance(found, str):
            raise RewardError(
                f"the reward function {self.name!r} returned {_shown(found)}; let it return a list of numbers, one for "
                "every completion."
            )
        if len(found) != count:
            raise RewardError(
                f"the reward function {self.name!r} returned {len(found)} rewards for {count} completions; let it return "
                "one for each."
            )
        return torch.tensor([self._number(value, index) for index, value in enumerate(found)], dtype=torch.float64)

    def _number(self, value: Any, index: int) -> float:
        if value is None:
            return math.nan
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"the reward function {self.name!r} returned {_shown(value)} for completion {index}; let it return a finite "
                "number."
            )
        return number


class Rewards:
    """All rewards of a run.

    Args:
        functions: the reward functions.
        weights: the weight of each; None for 1.

    Raises:
        ValueError: there is no function, or not one weight for each.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None) -> None:
        if not functions:
            raise ValueError("reward_funcs is empty; give a function, or the name of a reward model.")
        if weights is not None and len(weights) != len(functions):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(functions)} reward_funcs; give one for each."
            )
        self._functions = functions
        self._weights = torch.tensor([1.0] * len(functions) if weights is None else weights, dtype=torch.float64)
        # Functions of one name, such as two lambdas, have to be told apart in logs.
        names = [function.name for function in functions]
        self.names = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]

    @torch.no_grad()
    def of(self, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return the rewards of `count` answers by every function, (count, functions), float64; NaN for None.

        Args:
            count: number of answers.
            arguments: the arguments of the functions.

        Raises:
            RewardError: a function fails, or no function has a reward for an answer.
        """
        found = torch.stack([function(count, arguments) for function in self._functions], 1)
        unscored = found.isnan().all(1)
        if bool(unscored.any()):
            names = " and ".join(repr(name) for name in self.names)
            raise RewardError(
                f"the reward function {names} returned None for completion {int(unscored.nonzero()[0])}; let one of "
                "reward_funcs return a number."
            )
        return found

    def total(self, rewards: Tensor) -> Tensor:
        """Return the weighted sum over functions, (answers,); rewards: (answers, functions)."""
        return (rewards * self._weights).nansum(1)


class RewardModel:
    """A sequence classifier with one output as a reward function.

    Args:
        model: the classifier, which stays as it is.
        tokenizer: its tokenizer.
        chat_template_kwargs: arguments of its chat template.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
        self._model, self._tokenizer, self._more = model.eval(), tokenizer, dict(chat_template_kwargs)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """Return the model's first output for every prompt with its answer."""
        texts = [
            self._tokenizer.apply_chat_template(prompt + answer, tokenize=False, **self._more)
            if is_conversation(prompt)
            else prompt + answer
            for prompt, answer in zip(prompts, completions, strict=True)
        ]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
        inputs = self._tokenizer(text=texts, **options).to(next(self._model.parameters()).device)
        rewards: list[float] = self._model(**inputs).logits[:, 0].float().tolist()
        return rewards


def reward_functions(
    given: Any,
    tokenizers: Any,
    device: torch.device,
    model_init_kwargs: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any],
) -> list[RewardFunction]:
    """Make reward functions of what `EvolutionTrainer` takes as `reward_funcs`.

    Args:
        given: a function, the name or path of a sequence classifier, or the classifier itself; or a list of these.
        tokenizers: the tokenizer of every classifier, in the same form; None loads it.
        device: device of the classifiers.
        model_init_kwargs: arguments of `from_pretrained` for classifiers that are given by their names.
        chat_template_kwargs: arguments of the classifiers' chat templates.

    Raises:
        ValueError: an entry is neither of these, or there is not one tokenizer for each.
    """
    given = list(given) if isinstance(given, list | tuple) else [given]
    tokenizers = [None] * len(given) if tokenizers is None else tokenizers
    tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers]
    if len(tokenizers) != len(given):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(given)} reward_funcs; give one for each, or "
            "None."
        )
    return [
        _function(g, t, device, model_init_kwargs, chat_template_kwargs)
        for g, t in zip(given, tokenizers, strict=True)
    ]


def _function(
    given: Any, tokenizer: Any, device: torch.device, init: Mapping[str, Any], chat_template_kwargs: Mapping[str, Any]
) -> RewardFunction:
    if isinstance(given, str):
        given = AutoModelForSequenceClassification.from_pretrained(given, num_labels=1, **init)
    if isinstance(given, nn.Module):
        return _function_of_model(given, tokenizer, device, chat_template_kwargs)
    if not callable(given):
        raise ValueError(
            f"reward_funcs has a {type(given).__name__}; give functions, or sequence classifiers by name or as modules."
        )
    inner = given
    while isinstance(inner, functools.partial):
        inner = inner.func
    return RewardFunction(getattr(inner, "__name__", type(inner).__name__), given)


def _function_of_model(
    model: nn.Module, tokenizer: Any, device: torch.device, chat_template_kwargs: Mapping[str, Any]
) -> RewardFunction:
    name = type(model).__name__
    if isinstance(model, PreTrainedModel):
        path = model.config._name_or_path
        name = path.split("/")[-1] or name
        tokenizer = AutoTokenizer.from_pretrained(path) if tokenizer is None else tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model scores the last token in front of the padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if tokenizer is None:
        raise ValueError(f"the reward model {name} has no tokenizer; give it in reward_processing_classes.")
    return RewardFunction(name, RewardModel(model.to(device), tokenizer, chat_template_kwargs))


def _awaited(found: Any) -> Any:
    """Return the result of an asynchronous function, from a thread of its own: this one may run a loop already."""

    async def wait() -> Any:
        return await found

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _shown(value: Any) -> str:
    return str(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
