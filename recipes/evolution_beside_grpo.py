# /// script
# requires-python = ">=3.11"
# dependencies = ["zo-hf[trl]", "gguf", "matplotlib"]
# ///
"""Compare EvolutionTrainer with TRL's GRPO, which takes a backward pass, by generated tokens and by processor time.

    python recipes/evolution_beside_grpo.py                                 # less than an hour of one core
    python recipes/evolution_beside_grpo.py --steps 2 --rows 16 --seeds 1   # a short look

The task is that of json_reward.py: a reward for the form of a JSON answer. A step of either trainer has 32 answers: 16 prompts
with a pair of members each, or 4 prompts with 8 answers each. EvolutionTrainer takes four times as many steps, because the same tokens cost it about a quarter
of the time: the curves can be compared at equal tokens and at equal times. GRPO samples at temperature 1, and members of a population
answer with their likeliest tokens, as either trainer does by default. Each trains once at every rate, and its likeliest answers
are measured on prompts of a development split. The best rate of each trains again for every seed, and is measured on test
prompts. Names of the three splits differ.

Every run is a process of its own with one thread, so that its peak memory and processor time are its own. A run that has
finished is not repeated. --output gets a folder for each run, results.json and curves.png.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common.json_answers import HELD_OUT_NAMES, TOKENS, TRAIN_NAMES, form, parses, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ANSWERS = 32
GENERATIONS = 8  # of GRPO, for each prompt
RATES = {"evolution": (2e-3, 5e-3, 1e-2), "grpo": (1e-5, 3e-5, 1e-4)}
STEPS = {"evolution": 4, "grpo": 1}  # for each of --steps
EPS = 5e-3
MEASUREMENTS = {"development": 1, "test": 12}  # in a run, after its beginning
DEVELOPMENT = 10  # of the training names
SPLITS = {
    "train": TRAIN_NAMES.split()[:-DEVELOPMENT],
    "development": TRAIN_NAMES.split()[-DEVELOPMENT:],
    "test": HELD_OUT_NAMES.split(),
}


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


@dataclass
class Point:
    """A measurement.

    Attributes:
        step: number of steps so far.
        seconds: processor time of the training so far, without measurements.
        reward: mean reward of the likeliest answers.
        parses: part of these answers that have the right form.
        tokens: number of generated tokens so far.
    """

    step: int
    seconds: float
    reward: float
    parses: float
    tokens: float = 0.0


class Measure(TrainerCallback):
    """Measures the model at the beginning of training, and now and then.

    Args:
        run: the run.
        tokenizer: the model's tokenizer.

    Attributes:
        curve: the measurements.
    """

    def __init__(self, run: Run, tokenizer: Any) -> None:
        self._every = math.ceil(run.steps / MEASUREMENTS[run.split])
        texts = prompts(" ".join(SPLITS[run.split]), run.rows, 1)["prompt"][:]
        self._inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        self._tokenizer = tokenizer
        self.curve: list[Point] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._begin = time.process_time()
        self.see(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.see(model, state.global_step)

    @torch.no_grad()
    def see(self, model: Any, step: int) -> None:
        """Measure after a step."""
        now, was_training = time.process_time(), model.training
        answers = model.eval().generate(
            **self._inputs.to(model.device),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        model.train(was_training)
        start = self._inputs["input_ids"].shape[1]
        texts = self._tokenizer.batch_decode(answers[:, start:], skip_special_tokens=True)
        self.curve.append(Point(step, now - self._begin, mean(form(texts)), mean(parses(texts))))
        self._begin += time.process_time() - now


def trainer_of(run: Run, model: Any, tokenizer: Any, folder: Path) -> Any:
    """Return the trainer of a run; libraries of the other method are not imported."""
    common: dict[str, Any] = {
        "max_steps": run.steps,
        "learning_rate": run.rate,
        "lr_scheduler_type": "constant",
        "max_completion_length": TOKENS,
        "seed": run.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    data = prompts(" ".join(SPLITS["train"]), ANSWERS * run.steps, run.seed)
    if run.method == "evolution":
        from common.reward_runs import config

        from zo_hf.rewards import EvolutionTrainer

        evolution = config(folder, ANSWERS // 2, save_steps=1, zo_eps=EPS, **common)
        return EvolutionTrainer(model, form, evolution, train_dataset=data, processing_class=tokenizer)
    from trl import GRPOConfig, GRPOTrainer

    grpo = GRPOConfig(
        str(folder),
        per_device_train_batch_size=ANSWERS,
        num_generations=GENERATIONS,
        steps_per_generation=1,
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        **common,
    )
    return GRPOTrainer(model, form, grpo, train_dataset=data, processing_class=tokenizer)


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train, and return what was measured."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer, measure = trainer_of(run, model, tokenizer, folder), Measure(run, tokenizer)
    trainer.add_callback(measure)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    for point in measure.curve:
        point.tokens = ANSWERS * sum(line["completions/mean_length"] for line in lines[: point.step])
    return asdict(run) | {
        "curve": [asdict(point) for point in measure.curve],
        "training_rewards": [line["reward"] for line in lines],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def result_of(run: Run, output: Path) -> dict[str, Any]:
    """Return what a run measured, from a process of its own unless it has finished before."""
    file = output / run.name / "result.json"
    if not file.exists():
        command = [sys.executable, __file__, "--run", json.dumps(asdict(run)), "--output", str(output)]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    first, last = found["curve"][0], found["curve"][-1]
    print(
        f"{run.name}: reward {first['reward']:.3f} -> {last['reward']:.3f}, parse {first['parses']:.3f} -> "
        f"{last['parses']:.3f}, {last['seconds']:.0f} s",
        flush=True,
    )
    return found


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the rewards on test prompts against the generated tokens, and against the processor time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(
        both, ("tokens", "seconds"), ("generated tokens", "processor seconds of one thread"), strict=True
    ):
        for (method, runs), color in zip(results.items(), ("C0", "C1"), strict=True):
            for number, run in enumerate(runs):
                x, y = ([point[name] for point in run["curve"]] for name in (key, "reward"))
                axes.plot(x, y, color, marker=".", label=None if number else method)
        axes.set_xlabel(label)
    both[0].set(ylabel="mean reward on test prompts", ylim=(0, 1.02))
    both[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model and its tokenizer; default: SmolLM2-135M")
    parser.add_argument("--output", type=Path, default=Path("out/evolution_beside_grpo"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=6, help="number of steps of a run of GRPO")
    parser.add_argument("--rows", type=int, default=64, help="prompts on which a model is measured")
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
        from zo_hf.tasks.assets import default_model

        arguments.model = str(default_model())
    results = {}
    for method, rates in RATES.items():
        sizes = (arguments.model, STEPS[method] * arguments.steps, arguments.rows)
        tried = [result_of(Run(method, rate, 0, "development", *sizes), arguments.output) for rate in rates]
        best = max(tried, key=lambda found: found["curve"][-1]["reward"])["rate"]
        seeds = range(1, 1 + arguments.seeds)
        results[method] = [result_of(Run(method, best, seed, "test", *sizes), arguments.output) for seed in seeds]
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, arguments.output / "curves.png")
    print(f"{'':10} {'rate':>8} {'before':>7} {'after':>7} {'parse':>7} {'tokens':>8} {'seconds':>8} {'MiB':>6}")
    for method, runs in results.items():
        before = mean(run["curve"][0]["reward"] for run in runs)
        reward, right, tokens, seconds = (
            mean(run["curve"][-1][key] for run in runs) for key in ("reward", "parses", "tokens", "seconds")
        )
        print(
            f"{method:10} {runs[0]['rate']:8g} {before:7.3f} {reward:7.3f} {right:7.3f} {tokens:8.0f} {seconds:8.0f} "
            f"{mean(run['peak_mib'] for run in runs):6.0f}"
        )


if __name__ == "__main__":
    main()
