"""A script for TRL's GRPOTrainer changes two names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import seeded, tiny_llama
from tests.rewards.runs import counts_wanted, odd_words, prompts, tokenizer
from zo_hf.rewards import EvolutionConfig, EvolutionTrainer

#: Columns, messages and several functions, with options that both have.
OPTIONS: dict[str, Any] = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 4, "temperature": 0.9}
OPTIONS |= {"max_completion_length": 4, "reward_weights": [1.0, 0.5], "top_p": 0.9, "top_k": 50, "learning_rate": 1e-3}
OPTIONS |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "min_p": 0.01}
OPTIONS |= {"chat_template_kwargs": {}, "generation_kwargs": {"suppress_tokens": [9]}, "repetition_penalty": 1.1}


def script(folder: Path, trainer_kind: Any, config_kind: Any) -> tuple[set[str], set[str]]:
    """The keys that are logged, and the arguments that reward functions get."""
    seen: set[str] = set()

    def reward(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return odd_words([messages[0]["content"] for messages in arguments["completions"]])

    def other(completions: list[Any], **_: Any) -> list[float]:
        return counts_wanted([messages[0]["content"] for messages in completions])

    data = prompts(8, solution=[str(i) for i in range(8)])
    trainer = trainer_kind(
        model=seeded(tiny_llama, eos_token_id=1),
        reward_funcs=[reward, other],
        args=config_kind(str(folder), **OPTIONS),
        train_dataset=data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return set(trainer.state.log_history[0]), seen


def test_the_same_script(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    keys, arguments = script(tmp_path / "grpo", trl.GRPOTrainer, trl.GRPOConfig)
    own_keys, own_arguments = script(tmp_path / "evolution", EvolutionTrainer, EvolutionConfig)
    assert arguments - own_arguments <= {"log_extra", "log_metric"}
    # The rest of GRPO's are about its loss.
    shared = {key for key in keys if key.startswith(("reward", "frac_reward", "completions/"))}
    assert shared - own_keys <= {"completions/min_terminated_length", "completions/max_terminated_length"}
    assert len(shared & own_keys) >= 12
