# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft,quantization]"]
# ///
"""Train an 8-bit and a 4-bit model with forward passes only in several ways, and compare their final losses.

    python recipes/quantized_ways.py                              # SmolLM2-135M, embedded; needs no hub
    python recipes/quantized_ways.py --model MODEL --ways scales fold --formats nf4 --seeds 0

A way is a subspace with its options. First every way takes a few steps with each of several learning rates on the
first seed. The rate with the lowest loss then trains from the start with every seed. Losses are the cross entropy of
the label word over the whole vocabulary, on held-out sentences. The results in OUTPUT are runs.jsonl, from which an
interrupted comparison continues, table.md and losses.png.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common.experiments import StopWhenDiverged, encoded_reviews
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.trainer_callback import PrinterCallback

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.parallel.checksum import tensors_hash
from zo_hf.quantization import quantized_layers
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command

FORMATS: dict[str, Callable[[], BitsAndBytesConfig]] = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}
FOLD = {"zo_subspace": "low_rank", "zo_fold_steps": 100, "zo_exclude_modules": r".*(embed|norm|head).*"}
# For each way, the center of its learning rates, and its options of ZOConfig.
WAYS: dict[str, tuple[float, dict[str, Any]]] = {
    "adapter": (1e-4, {"zo_subspace": "adapter", "zo_target_modules": r".*lora_.*"}),
    "factors": (3e-6, {"zo_subspace": "low_rank", "zo_fold_steps": 0}),
    "fold": (3e-6, FOLD),
    "fold gptq": (3e-6, FOLD | {"zo_fold_rounding": "gptq"}),
    "scales": (3e-3, {"zo_subspace": "scales"}),
    "norms": (1e-2, {"zo_subspace": "norms"}),
}
SETTINGS = ("model", "way", "format", "seed", "learning_rate", "steps", "batch_size")


def arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a causal language model, a folder or a name; default: the embedded SmolLM2-135M")
    ways, formats = list(WAYS), list(FORMATS)
    add("--ways", nargs="+", default=ways, choices=ways, metavar="WAY", help="ways: %(choices)s (all)")
    add(
        "--formats",
        nargs="+",
        default=["int8", "nf4"],
        choices=formats,
        metavar="FORMAT",
        help="formats of the weights: %(choices)s (%(default)s)",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the full runs (%(default)s)")
    add("--steps", type=int, default=300, help="steps of a full run (%(default)s)")
    add("--trial-steps", type=int, default=60, help="steps with each learning rate (%(default)s)")
    factors = [0.1, 0.3, 1, 3]
    add("--factors", type=float, nargs="+", default=factors, help="factors on the way's center rate (%(default)s)")
    add("--batch-size", type=int, default=8, help="sentences in a step (%(default)s)")
    add("--output", type=Path, default=Path("out/quantized_ways"), help="folder for results (%(default)s)")
    return parser.parse_args()


class Comparison:
    """The model, the sentences and the finished runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = args.model or str(default_model())
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)

    def run(self, way: str, kind: str, seed: int, learning_rate: float, steps: int) -> dict[str, Any]:
        """Return the run with these settings; train it unless it is finished."""
        values = (self.path, way, kind, seed, learning_rate, steps, self.args.batch_size)
        settings = dict(zip(SETTINGS, values, strict=True))
        return self.finished.found_or_made(settings, lambda: self._train(way, kind, seed, learning_rate, steps))

    def _train(self, way: str, kind: str, seed: int, learning_rate: float, steps: int) -> dict[str, Any]:
        train, held_out = encoded_reviews(self.tokenizer, 1024, 128, seed, words=range(8, 13))
        model = load(self.path, kind, way, seed)
        codes = codes_hash(model)
        stop = StopWhenDiverged()
        trainer = ZOTrainer(
            model,
            config(self.args.output, way, seed, learning_rate, steps, self.args.batch_size),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=LabelWordCollator(self.tokenizer, model),
            callbacks=[stop],
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        stop.limit = 2 * before
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        logs = trainer.state.log_history
        return {
            "before": before,
            "after": trainer.evaluate()["eval_loss"],
            "codes_unchanged": codes_hash(trainer.model) == codes,
            "fold_error": next((entry["zo/fold_error"] for entry in reversed(logs) if "zo/fold_error" in entry), None),
            "seconds": seconds,
            "losses": [(entry["step"], entry["loss"]) for entry in logs if "loss" in entry],
        }


def load(path: str, kind: str, way: str, seed: int) -> nn.Module:
    """Load the quantized model, with an adapter if the way needs one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=FORMATS[kind](), device_map=device, dtype=dtype
    )
    if way == "adapter":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model


def config(output: Path, way: str, seed: int, learning_rate: float, steps: int, batch_size: int) -> ZOConfig:
    return ZOConfig(
        output_dir=str(output / "trainer"),
        seed=seed,
        learning_rate=learning_rate,
        max_steps=steps,
        zo_rows_per_direction=0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        **WAYS[way][1],
    )


def codes_hash(model: nn.Module) -> str:
    """Return a hash of all quantization codes, which only a fold may change."""
    names = {module: name for name, module in model.named_modules()}
    layers = quantized_layers(model).items()
    plain = {
        names[module].replace("base_model.model.", "").replace(".base_layer", ""): layer for module, layer in layers
    }
    return tensors_hash({name: layer.storage()["weight"] for name, layer in plain.items()})


def write_table(results: list[list[dict[str, Any]]], folder: Path) -> str:
    """Write a table with a row for each way and format, over the seeds, and return it."""
    lines = [
        "| way | format | learning rate | loss before | after, mean ± std | each seed | codes | last fold's error |",
        "|---|---|---:|---:|---:|---|---|---:|",
    ]
    for runs in results:
        first, after = runs[0], [run["after"] for run in runs]
        spread = f" ± {stdev(after):.2f}" if len(after) > 1 else ""
        each = ", ".join(f"{run['before']:.2f} → {run['after']:.2f}" for run in runs)
        codes = "unchanged" if all(run["codes_unchanged"] for run in runs) else "moved"
        error = "" if first["fold_error"] is None else f"{mean(run['fold_error'] for run in runs):.1%}"
        lines.append(
            f"| {first['way']} | {first['format']} | {first['learning_rate']:g} "
            f"| {mean(run['before'] for run in runs):.2f} | {mean(after):.2f}{spread} | {each} | {codes} | {error} |"
        )
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table, encoding="utf-8")
    return table


def plot(results: list[list[dict[str, Any]]], path: Path) -> None:
    """Draw the training loss against steps: the mean over seeds, and each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(runs[0]["format"] for runs in results))
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        for index, runs in enumerate(runs for runs in results if runs[0]["format"] == kind):
            curves = [[loss for _, loss in run["losses"]] for run in runs]
            shortest = min(map(len, curves))
            steps = [step for step, _ in runs[0]["losses"]][:shortest]
            for curve in curves:
                axes.plot(steps, curve[:shortest], color=f"C{index}", alpha=0.25, linewidth=0.8)
            average = [mean(curve[i] for curve in curves) for i in range(shortest)]
            axes.plot(steps, average, color=f"C{index}", label=f"{runs[0]['way']}, {runs[0]['learning_rate']:g}")
        axes.set_title(kind)
        axes.set_xlabel("steps of two forward passes")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("training loss, mean of ten steps")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about every cast of an input
    comparison = Comparison(args)
    pairs = [(way, kind) for kind in args.formats for way in args.ways]
    results = []
    with tqdm(total=len(pairs) * (len(args.factors) + len(args.seeds)), unit="run") as bar:
        for way, kind in pairs:
            trials = []
            for factor in args.factors:
                bar.set_description(f"{way} {kind} x{factor:g}")
                trials.append(comparison.run(way, kind, args.seeds[0], factor * WAYS[way][0], args.trial_steps))
                bar.update()
            best = min(trials, key=lambda run: run["after"] if math.isfinite(run["after"]) else math.inf)
            runs = []
            for seed in args.seeds:
                bar.set_description(f"{way} {kind} seed {seed}")
                runs.append(comparison.run(way, kind, seed, best["learning_rate"], args.steps))
                bar.update()
            results.append(runs)
            write_table(results, args.output)
    print(write_table(results, args.output))
    plot(results, args.output / "losses.png")


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
