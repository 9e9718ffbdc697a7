# /// script
# requires-python = ">=3.11"
# dependencies = ["zo-hf[trl]", "matplotlib"]
# ///
"""Compare EvolutionTrainer with TRL's GRPO, which takes a backward pass, at an equal number of generated tokens.

    python recipes/evolution_beside_grpo.py --model STORIES     # a folder of Stories-15M, or of another small model
    python recipes/evolution_beside_grpo.py --model STORIES --steps 4 --rows 16 --seeds 1

A model continues "Once upon a time, there was a kind girl named Mia." The reward is 1 if the continuation names an animal, and 0
if not. Both trainers sample at temperature 1, and a step of either has 32 answers: 16 prompts with a pair of members each, or 4
prompts with 8 answers each. Each trains once at every rate, and is measured on prompts of a development split. The best rate of
each trains again for every seed, and is measured on test prompts. Names of the three splits differ.

Every run is a process of its own with one thread, so that its peak memory and processor time are its own. A run that has
finished is not repeated. --output gets a folder for each run, results.json and curves.png.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ANIMALS = (
    "dog cat bird bunny rabbit bear fish frog duck mouse horse cow pig lion fox butterfly squirrel puppy kitten bug"
)
SPLITS = {
    "train": "Ada Amy Ana Ben Bob Carl Clara Dan David Ella Emil Eva Finn Frank Hugo Ida Jack Jane Joe John Kate Kim",
    "development": "Leo Lily Lisa Mark Mary Max",
    "test": "Mia Nina Noah Olga Paul Peter Sara Tom",
}
PROMPT = "Once upon a time, there was a {word} {child} named {name}."
TOKENS = 16
ANSWERS = 32
GENERATIONS = 8  # of GRPO, for each prompt
RATES = {"evolution": (1e-3, 3e-3, 1e-2), "grpo": (1e-5, 3e-5, 1e-4)}
EPS = 5e-3
MEASUREMENTS = 5  # in a run, after its beginning


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        method: "evolution" or "grpo".
        rate: the learning rate.
        seed: seed of prompts, directions and samples.
        split: prompts on which the model is measured.
        model: folder of the model.
        steps: number of steps.
        rows: number of prompts on which the model is measured.
    """

    method: str
    rate: float
    seed: int
    split: str
    model: str
    steps: int
    rows: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.method}-{self.rate:g}-{self.split}-{self.seed}-{self.steps}-{self.rows}"


def names_animal(completions: list[str], **_: Any) -> list[float]:
    """Return 1 for a text that names an animal, and else 0."""
    animals = {animal + ending for animal in ANIMALS.split() for ending in ("", "s")}
    return [float(not animals.isdisjoint(re.findall("[a-z]+", text.lower()))) for text in completions]


def prompts(split: str, count: int, seed: int) -> Dataset:
    """Return prompts of a split."""
    draw = random.Random(seed)
    parts = {"word": ("kind", "little", "happy", "brave", "sad", "clever"), "child": ("girl", "boy", "child")}
    chosen = [
        {k: draw.choice(v) for k, v in parts.items()} | {"name": draw.choice(SPLITS[split].split())}
        for _ in range(count)
    ]
    return Dataset.from_list([{"prompt": PROMPT.format(**parts)} for parts in chosen])


def reward_of(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return the mean reward of an answer to each prompt, with the same random numbers at every call."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    was_training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        answers = model.eval().generate(
            **inputs, max_new_tokens=TOKENS, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
        )
    model.train(was_training)
    return mean(names_animal(tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :])))


class Measure(TrainerCallback):
    """Measures the model at the beginning and now and then.

    Args:
        run: the run.
        tokenizer: the model's tokenizer.

    Attributes:
        curve: pairs of a step and the mean reward.
        seconds: processor time of all measurements.
    """

    def __init__(self, run: Run, tokenizer: Any) -> None:
        self._every = max(1, run.steps // MEASUREMENTS)
        self._tokenizer, self._texts = tokenizer, prompts(run.split, run.rows, 1)["prompt"][:]
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self.see(model, state.global_step)

    def see(self, model: Any, step: int) -> None:
        """Measure after a step."""
        begin = time.process_time()
        self.curve.append((step, reward_of(model, self._tokenizer, self._texts)))
        self.seconds += time.process_time() - begin


def trainer_of(run: Run, model: Any, tokenizer: Any, folder: Path) -> Any:
    """Return the trainer of a run; libraries of the other method are not imported."""
    common: dict[str, Any] = {
        "max_steps": run.steps,
        "learning_rate": run.rate,
        "lr_scheduler_type": "constant",
        "max_completion_length": TOKENS,
        "temperature": 1.0,
        "seed": run.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    data = prompts("train", ANSWERS * run.steps, run.seed)
    if run.method == "evolution":
        from zo_hf.rewards import EvolutionConfig, EvolutionTrainer

        evolution = EvolutionConfig(
            str(folder),
            per_device_train_batch_size=ANSWERS // 2,
            population=ANSWERS,
            generations_per_prompt=2,
            zo_eps=EPS,
            zo_exclude_modules=r".*(embed|norm).*",
            **common,
        )
        return EvolutionTrainer(model, names_animal, evolution, train_dataset=data, processing_class=tokenizer)
    from trl import GRPOConfig, GRPOTrainer

    grpo = GRPOConfig(
        str(folder),
        per_device_train_batch_size=ANSWERS,
        num_generations=GENERATIONS,
        steps_per_generation=1,
        bf16=False,
        gradient_checkpointing=False,
        **common,
    )
    return GRPOTrainer(model, names_animal, grpo, train_dataset=data, processing_class=tokenizer)


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train, and return what was measured."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer, measure = trainer_of(run, model, tokenizer, folder), Measure(run, tokenizer)
    measure.see(model, 0)
    trainer.add_callback(measure)
    measured, begin = measure.seconds, time.process_time()
    trainer.train()
    seconds = time.process_time() - begin - (measure.seconds - measured)
    lines = [line for line in trainer.state.log_history if "reward" in line]
    return asdict(run) | {
        "curve": measure.curve,
        "reward": measure.curve[-1][1],
        "training_rewards": [line["reward"] for line in lines],
        "tokens": sum(line["completions/mean_length"] for line in lines) * ANSWERS,
        "seconds_per_step": seconds / run.steps,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def result_of(run: Run, output: Path) -> dict[str, Any]:
    """Return what a run measured, from a process of its own unless it has finished before."""
    file = output / run.name / "result.json"
    if not file.exists():
        command = [sys.executable, __file__, "--run", json.dumps(asdict(run)), "--output", str(output)]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    print(f"{run.name}: reward {found['curve'][0][1]:.3f} -> {found['reward']:.3f}", flush=True)
    return found


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the rewards on test prompts against the generated tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for (method, runs), color in zip(results.items(), ("C0", "C1"), strict=True):
        for number, run in enumerate(runs):
            tokens = [step / run["steps"] * run["tokens"] for step, _ in run["curve"]]
            axes.plot(
                tokens, [reward for _, reward in run["curve"]], color, marker=".", label=None if number else method
            )
    axes.set(xlabel="generated tokens", ylabel="answers that name an animal", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
    parser.add_argument("--output", type=Path, default=Path("out/evolution_beside_grpo"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=60, help="number of steps of a run")
    parser.add_argument("--rows", type=int, default=256, help="prompts on which a model is measured")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each method at its best rate")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run = Run(**json.loads(arguments.run))
        folder = arguments.output / run.name
        found = train(run, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    if not arguments.model:
        parser.error("--model is missing; give the folder of a small causal language model")
    results = {}
    for method, rates in RATES.items():
        sizes = (arguments.model, arguments.steps, arguments.rows)
        tried = [result_of(Run(method, rate, 0, "development", *sizes), arguments.output) for rate in rates]
        best = max(tried, key=lambda found: found["reward"])["rate"]
        seeds = range(1, 1 + arguments.seeds)
        results[method] = [result_of(Run(method, best, seed, "test", *sizes), arguments.output) for seed in seeds]
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, arguments.output / "curves.png")
    print(f"{'':10} {'rate':>8} {'before':>7} {'after':>7} {'tokens':>8} {'s/step':>7} {'MiB':>6}")
    for method, runs in results.items():
        row = {key: mean(run[key] for run in runs) for key in ("reward", "tokens", "seconds_per_step", "peak_mib")}
        before = mean(run["curve"][0][1] for run in runs)
        print(
            f"{method:10} {runs[0]['rate']:8g} {before:7.3f} {row['reward']:7.3f} {row['tokens']:8.0f} "
            f"{row['seconds_per_step']:7.2f} {row['peak_mib']:6.0f}"
        )


if __name__ == "__main__":
    main()
