"""Train the methods of PEFT on the same sentences with forward passes only, and compare their final losses.

    python recipes/peft_methods.py                                     # SmolLM2-135M, embedded; needs no hub
    python recipes/peft_methods.py --model MODEL --output out/peft     # another causal model, a folder or a name

First every method takes a few steps with each of several learning rates, which are multiples of its family's default.
The rate with the lowest loss then trains from the start. Losses are the cross entropy of the label word over the whole
vocabulary, on held-out sentences. The results in OUTPUT are runs.jsonl, from which an interrupted comparison
continues, table.md and losses.png.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common.experiments import StopWhenDiverged, encoded_reviews
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.subspaces.peft_methods import family
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command

CAUSAL = TaskType.CAUSAL_LM
ATTENTION = ["q_proj", "v_proj"]
METHODS = {
    "LoRA": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, task_type=CAUSAL),
    "LoRA, A and B": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, task_type=CAUSAL),
    "LN tuning": lambda: LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm"], task_type=CAUSAL
    ),
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type=CAUSAL),
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type=CAUSAL),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=CAUSAL
    ),
    "DoRA": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, use_dora=True, task_type=CAUSAL),
    "VeRA": lambda: VeraConfig(r=64, target_modules=["q_proj"], task_type=CAUSAL),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=64, task_type=CAUSAL),
}

# Options of ZOConfig in addition to the learning rate.
OPTIONS: dict[str, dict[str, Any]] = {"LoRA, A and B": {"zo_target_modules": r".*lora_.*"}}
SETTINGS = ("model", "method", "factor", "steps", "seed", "batch_size")


def arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a causal language model with Llama's layers; default: the embedded SmolLM2-135M")
    names = list(METHODS)
    add("--methods", nargs="+", default=names, choices=names, metavar="METHOD", help="methods: %(choices)s (all)")
    add("--steps", type=int, default=300, help="steps of a full run (%(default)s)")
    add("--trial-steps", type=int, default=40, help="steps with each learning rate (%(default)s)")
    factors = [0.3, 1, 3, 10]
    add("--factors", type=float, nargs="+", default=factors, help="factors on the default learning rate (%(default)s)")
    add("--batch-size", type=int, default=8, help="sentences in a step (%(default)s)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of the full runs; the first one selects the learning rate (%(default)s)",
    )
    add("--output", type=Path, default=Path("out/peft_methods"), help="folder for results (%(default)s)")
    return parser.parse_args()


class Comparison:
    """The model, the sentences and the finished runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = args.model or str(default_model())
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)

    def run(self, method: str, factor: float, seed: int, steps: int) -> dict[str, Any]:
        """Return the run with `factor` times the method's default learning rate; train it unless it is finished."""
        values = (self.path, method, factor, steps, seed, self.args.batch_size)
        settings = dict(zip(SETTINGS, values, strict=True))
        return self.finished.found_or_made(settings, lambda: self._train(method, factor, seed, steps))

    def _train(self, method: str, factor: float, seed: int, steps: int) -> dict[str, Any]:
        train, held_out = encoded_reviews(self.tokenizer, 512, 128, seed, words=range(8, 11))
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        model = get_peft_model(base, METHODS[method]())
        rate = factor * family(model).learning_rate
        config = ZOConfig(
            output_dir=str(self.args.output / "trainer"),
            learning_rate=rate,
            max_steps=steps,
            zo_rows_per_direction=0,
            per_device_train_batch_size=self.args.batch_size,
            per_device_eval_batch_size=64,
            seed=seed,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            remove_unused_columns=False,
            **OPTIONS.get(method, {}),
        )
        collator = LabelWordCollator(self.tokenizer, base)
        # For these methods PEFT puts labels of the prompt in front, so logits are needed at every position.
        collator.takes_logits_to_keep &= method not in ("prompt tuning", "p-tuning")
        data = {"train_dataset": train, "eval_dataset": held_out, "data_collator": collator}
        stop = StopAndNoteDistance()
        trainer = ZOTrainer(model, config, **data, callbacks=[stop])
        before = trainer.evaluate()["eval_loss"]
        stop.limit = 2 * before
        started = time.perf_counter()
        trainer.train()
        curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return {
            "learning_rate": rate,
            "eps": 0.0 if stop.eps is None else stop.eps,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "before": before,
            "after": trainer.evaluate()["eval_loss"],
            "seconds": time.perf_counter() - started,
            "losses": curve,
        }


class StopAndNoteDistance(StopWhenDiverged):
    """Ends a diverged run, and notes the distance of the probes in `eps`."""

    eps: float | None = None

    def on_train_begin(self, args: ZOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the distance."""
        model = kwargs["model"]
        self.eps = family(model).eps if args.zo_eps == "auto" else float(args.zo_eps)


def write_table(runs: list[dict[str, Any]], folder: Path) -> str:
    """Write a table with a row for each full run, and return it."""
    lines = [
        "| method | weights that move | ε | learning rate | seed | loss before | after |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {run['method']} | {run['parameters']:,} | {run['eps']:g} | {run['learning_rate']:g} "
        f"| {run['seed']} | {run['before']:.3f} | {run['after']:.3f} |"
        for run in runs
    ]
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table, encoding="utf-8")
    return table


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the training loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in (run for run in runs if run["seed"] == runs[0]["seed"]):
        steps, losses = zip(*run["losses"], strict=True)
        axes.plot(steps, losses, label=f"{run['method']}, {run['learning_rate']:g}")
    axes.set_xlabel("steps of two forward passes")
    axes.set_ylabel("training loss, mean of ten steps")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    comparison = Comparison(args)
    runs: list[dict[str, Any]] = []
    with tqdm(total=len(args.methods) * (len(args.factors) + len(args.seeds)), unit="run") as bar:
        for method in args.methods:
            trials = []
            for factor in args.factors:
                bar.set_description(f"{method}, learning rate x {factor:g}")
                trials.append(comparison.run(method, factor, args.seeds[0], args.trial_steps))
                bar.update()
            best = min(trials, key=lambda run: run["after"] if math.isfinite(run["after"]) else math.inf)
            for seed in args.seeds:
                bar.set_description(f"{method}, seed {seed}, {args.steps} steps")
                runs.append(comparison.run(method, best["factor"], seed, args.steps))
                bar.update()
            write_table(runs, args.output)
    print(write_table(runs, args.output))
    try:
        plot(runs, args.output / "losses.png")
    except ImportError:
        print("no plot: install matplotlib for losses.png")


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
