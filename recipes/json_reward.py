# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf", "gguf"]
# ///
"""Teach SmolLM2-135M to answer in JSON by a reward for the form of its answer alone.

    python recipes/json_reward.py                # continues if interrupted
    python recipes/json_reward.py --steps 10     # a short look

The model reads "Mia is 7 years old." and "As JSON with the keys "name" and "age":". The full reward is for an answer that
`json.loads` reads as an object with these two keys and no other. Zero-shot, the model mostly puts its object into a code fence,
which does not parse. A part of the reward is for an answer that begins with a brace, and for each key, because a reward that
is always 0 has no slope. Results are counted in answers that parse, to prompts with names that training never sees. --output
gets a folder for each seed, with results.json and the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from common.reward_runs import config, run
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf.rewards import EvolutionTrainer
from zo_hf.tasks.assets import default_model

PROMPTS = 16
#: Tokens of an answer; one over several lines takes about 18.
TOKENS = 20

PROMPT = '{name} is {age} years old.\nAs JSON with the keys "name" and "age":'
TRAIN_NAMES = (
    "Ada Ali Amy Ana Ben Bob Carl Clara Dan David Dora Ella Emil Eric Eva Finn Frank George Hugo Ida Igor Ivan Jack James "
    "Jane Joe John Julia Karl Kate Kim Laura Leo Lily Lisa Luis Maria Mark Mary Max Mia Mike Nina Noah Olga Oscar Paul Peter"
)
HELD_OUT_NAMES = "Alan Anna Bill Diana Emma Fred Grace Helen Ian Jim Lucy Nora Omar Rita Sam Sara Tina Tom Victor Zoe"
AGES = range(2, 90)


def is_answer(text: str) -> bool:
    """Return True for the JSON of an object that has the two keys and no other."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == {"name", "age"}


def form(completions: list[str], **_: Any) -> list[float]:
    """Return 1 for an answer of the right form, and else a quarter for a brace in front and for each key."""
    return [1.0 if is_answer(text) else _part(text) for text in completions]


def _part(text: str) -> float:
    return (text.lstrip().startswith("{") + ('"name":' in text) + ('"age":' in text)) / 4


def parses(completions: list[str], **_: Any) -> list[float]:
    """Return 1 for an answer of the right form, and else 0; only reported."""
    return [float(is_answer(text)) for text in completions]


def is_right(completions: list[str], name: list[str], age: list[int], **_: Any) -> list[float]:
    """Return 1 for an answer of the right form with the right values, and else 0; only reported."""
    rows = zip(completions, name, age, strict=True)
    return [float(is_answer(text) and json.loads(text) == {"name": n, "age": a}) for text, n, a in rows]


def prompts(names: str, count: int, seed: int) -> Dataset:
    """Return prompts about these names, with the values that an answer should have."""
    draw = random.Random(seed)
    rows = [{"name": draw.choice(names.split()), "age": draw.choice(AGES)} for _ in range(count)]
    return Dataset.from_list([row | {"prompt": PROMPT.format(**row)} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/json_reward"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=20, help="number of steps")
    parser.add_argument("--held-out", type=int, default=64, help="number of test prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and directions")
    arguments = parser.parse_args()
    output = arguments.output / f"seed-{arguments.seed}"

    model = AutoModelForCausalLM.from_pretrained(default_model(), dtype="float32")
    trainer = EvolutionTrainer(
        model,
        [form, parses, is_right],
        config(
            output,
            PROMPTS,
            save_steps=5,
            max_steps=arguments.steps,
            seed=arguments.seed,
            per_device_eval_batch_size=64,
            reward_weights=[1.0, 0.0, 0.0],
            zo_eps=5e-3,
            learning_rate=5e-3,
            max_completion_length=TOKENS,
        ),
        train_dataset=prompts(TRAIN_NAMES, 4000, arguments.seed),
        eval_dataset=prompts(HELD_OUT_NAMES, arguments.held_out, arguments.seed + 1),
        processing_class=AutoTokenizer.from_pretrained(default_model()),
    )

    def measured(when: str) -> dict[str, float]:
        found = trainer.evaluate()
        result = {name: found[f"eval_rewards/{name}/mean"] for name in ("form", "parses", "is_right")}
        print(f"{when}: {result['parses']:.3f} parse, {result['is_right']:.3f} are right", flush=True)
        return result

    run(trainer, measured)


if __name__ == "__main__":
    main()
