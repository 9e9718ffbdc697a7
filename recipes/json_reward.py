# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]"]
# ///
"""Teach SmolLM2-135M to answer in JSON by a reward for the form of its answer alone.

    python recipes/json_reward.py                # some minutes of one core; continues if interrupted
    python recipes/json_reward.py --steps 10     # a short look

The model reads "Mia is 7 years old." and "As JSON with the keys "name" and "age":". The full reward is for an answer that
`json.loads` reads as an object with these two keys and no other. Zero-shot, the model mostly puts its object into a code fence,
which does not parse. A part of the reward is for an answer that begins with a brace, and for each key, because a reward that
is always 0 has no slope. Results are counted in answers that parse, to prompts with names that training never sees. --output
gets a folder for each seed, with results.json and the checkpoints, and curves.png with all seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.json_answers import HELD_OUT_NAMES, TOKENS, TRAIN_NAMES, form, is_right, parses, prompts
from common.reward_runs import config, plot, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf.rewards import EvolutionTrainer
from zo_hf.tasks.assets import default_model

PROMPTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/json_reward"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=30, help="number of steps")
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
            eval_steps=5,
            reward_weights=[1.0, 0.0, 0.0],
            zo_eps=5e-3,
            learning_rate=1e-2,
            max_completion_length=TOKENS,
        ),
        train_dataset=prompts(TRAIN_NAMES, 4000, arguments.seed),
        eval_dataset=prompts(HELD_OUT_NAMES, arguments.held_out, arguments.seed + 1),
        processing_class=AutoTokenizer.from_pretrained(default_model()),
    )

    def measured(when: str) -> dict[str, float]:
        found = trainer.evaluate()
        result = {name: found[f"eval_rewards/{name}/mean"] for name in ("parses", "form", "is_right")}
        print(f"{when}: {result['parses']:.3f} parse, {result['is_right']:.3f} are right", flush=True)
        return result

    run(trainer, measured, "eval_rewards/parses/mean")
    plot({"reward": arguments.output}, "held-out answers that parse", arguments.output / "curves.png")


if __name__ == "__main__":
    main()
