# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Test whether a language model reaches the edge of stability, which arXiv 2604.14669 does not, with forward passes.

    python recipes/edge_of_stability_language_model.py                      # SmolLM2-135M, embedded; some hours of one core
    python recipes/edge_of_stability_language_model.py --model MODEL --subspaces low_rank --steps 2000
    python recipes/edge_of_stability_language_model.py --plot-only --figures docs/figures

The data is one batch of sentences, so that the directions are the only noise. Zeroth-order gradient descent (SGD
without momentum) lowers the model's own loss of the label word. It moves a low-rank subspace that is never folded, or
a LoRA adapter. The step size is the lower bound on the critical step size of the initial model, 2/(Tr + 2‖H‖), divided
by a margin. During a run, the stability monitor measures the trace and ‖H‖, which is at least λmax.

The results are runs.jsonl in OUTPUT, from which an interrupted comparison continues, table.md, and the figure
stability-language-model.png in FIGURES. A run is at the edge where the band [Tr, Tr + 2‖H‖] reaches the dashed line
2/η.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common.experiments import encoded_reviews
from common.finished import add_report_options, finished_runs, report_runs
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf import ZerothOrder
from zo_hf.comparison.finished_runs import finished_runs_are_kept
from zo_hf.stability.actions import ACTIONS
from zo_hf.stability.curvature import hessian_trace
from zo_hf.stability.monitor import StabilityMonitor
from zo_hf.subspaces import Adapter, LowRank
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("model", "subspace", "margin", "steps", "sentences", "every", "action", "seed")
SUBSPACES = ("low_rank", "lora")
#: Number of directions along which the curvature is measured before the first step.
DIRECTIONS_BEFORE = 24
DIVERGED = 10.0  # a run has diverged when its loss is this many times the initial loss


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a causal language model, a folder or a name; default: the embedded SmolLM2-135M")
    add("--subspaces", nargs="+", choices=SUBSPACES, default=list(SUBSPACES), help="subspaces (all)")
    add("--margins", type=float, nargs="+", default=[0.7, 1.5, 4.0], help="bound / η at the start (%(default)s)")
    add("--steps", type=int, default=1000, help="steps of a run (%(default)s)")
    add("--sentences", type=int, default=8, help="sentences in the batch (%(default)s)")
    add("--every", type=int, default=5, help="steps between measurements (%(default)s)")
    add("--action", choices=ACTIONS, default="warn", help="action of the monitor beyond the edge (%(default)s)")
    add("--seed", type=int, default=0, help="seed of sentences, directions and the adapter (%(default)s)")
    add_report_options(parser, Path("out/edge_of_stability_language_model"))
    args = parser.parse_args(words)
    for option in ("steps", "sentences", "every"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)} must be at least 1.")
    if min(args.margins) <= 0:
        parser.error(f"--margins {min(args.margins)} must be above 0.")
    args.model = args.model or str(default_model())
    return args


def train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run, and return its settings and measurements."""
    torch.set_num_threads(1)
    seed, every = settings["seed"], settings["every"]
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows, _ = encoded_reviews(tokenizer, settings["sentences"], 1, seed, range(8, 13))
    batch = LabelWordCollator(tokenizer, model)(list(rows))
    model, subspace = with_subspace(model, settings["subspace"], seed)

    def closure() -> torch.Tensor:
        return model(**batch).loss

    zo = ZerothOrder(model, subspace, seed=seed, batched_probes=False)
    start = hessian_trace(zo, closure, DIRECTIONS_BEFORE)
    norm = start.standard_error * math.sqrt(start.count / 2)
    rate = 2 / (start.value + 2 * norm) / settings["margin"]
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=rate))
    monitor = StabilityMonitor(zo, optimizer, every, settings["action"])
    started, losses, curve = time.process_time(), [], []
    for step in range(settings["steps"]):
        losses.append(zo.estimate(closure).loss)
        optimizer.step()
        found = monitor.found
        if step % every == 0 and found is not None and math.isfinite(losses[-1]):
            trace = {"trace": found.trace.value, "error": found.trace.standard_error, "norm": found.lambda_max}
            curve.append({"step": step, "loss": losses[-1]} | trace)
        if not losses[-1] < DIVERGED * losses[0]:
            break
    return dict(settings) | {
        "learning_rate": rate,
        "dimension": subspace.dimension,
        "initial_trace": start.value,
        "initial_trace_error": start.standard_error,
        "initial_norm": norm,
        "curve": curve,
        "losses": losses,
        "forward_passes": zo.forward_passes,
        "seconds": time.process_time() - started,
    }


def with_subspace(model: Any, name: str, seed: int) -> tuple[nn.Module, Any]:
    """Return the model, with an adapter if the subspace needs one, and the subspace, whose basis never changes."""
    if name == "low_rank":
        return model, LowRank(model, seed=seed, fold_steps=0, exclude_modules=r".*(embed|norm).*")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # PEFT draws the adapter from torch's own generator
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model, Adapter(model, seed=seed)


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the settings of the requested runs."""
    shared = {name: getattr(args, name) for name in ("model", "steps", "sentences", "every", "action", "seed")}
    for subspace in args.subspaces:
        for margin in args.margins:
            yield shared | {"subspace": subspace, "margin": margin}


def table(finished: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the runs' starts and ends; η·(Tr + 2‖H‖)/2 and η·Tr/2 are 1 at the bounds of the edge."""
    lines = [
        "| subspace | margin | η | loss | Tr | ‖H‖ | η·Tr/2 at the end | its maximum | η·(Tr + 2‖H‖)/2 at the end | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for run in finished:
        last, eta = run["curve"][-1], run["learning_rate"]
        highest = max(point["trace"] for point in run["curve"])
        cells = [
            run["subspace"],
            f"{run['margin']:g}",
            f"{eta:.2g}",
            f"{run['losses'][0]:.3g} → {last['loss']:.3g}",
            f"{run['initial_trace']:.3g} → {last['trace']:.3g}",
            f"{run['initial_norm']:.3g} → {last['norm']:.3g}",
            f"{eta * last['trace'] / 2:.2f}",
            f"{eta * highest / 2:.2f}",
            f"{eta * (last['trace'] + 2 * last['norm']) / 2:.2f}",
            f"diverges at {len(run['losses'])}" if len(run["losses"]) < run["steps"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(finished: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw the loss, and below it the band of the trace with its threshold, in a column for each subspace.

    The figure is stability-language-model.png.
    """
    from matplotlib.figure import Figure

    subspaces = list(dict.fromkeys(run["subspace"] for run in finished))
    figure = Figure(figsize=(5 * len(subspaces), 6), layout="constrained")
    panels = figure.subplots(2, len(subspaces), squeeze=False, sharex=True)
    for column, subspace in enumerate(subspaces):
        above, below = panels[:, column]
        for color, run in enumerate(run for run in finished if run["subspace"] == subspace):
            steps = [point["step"] for point in run["curve"]]
            traces = [point["trace"] for point in run["curve"]]
            tops = [point["trace"] + 2 * point["norm"] for point in run["curve"]]
            label = f"η = {run['learning_rate']:.1e} (margin {run['margin']:g})"
            above.plot(run["losses"], color=f"C{color}", linewidth=0.7, label=label)
            below.fill_between(steps, traces, tops, color=f"C{color}", alpha=0.25, linewidth=0)
            below.plot(steps, traces, color=f"C{color}", linewidth=1)
            below.axhline(2 / run["learning_rate"], color=f"C{color}", linestyle="--", linewidth=1)
        above.set(title=subspace, ylabel="loss", ylim=(0, 1.5 * finished[0]["losses"][0]))
        above.legend(fontsize="x-small")
        below.set(xlabel="step", ylabel="Tr to Tr + 2‖H‖, and 2/η (dashed)", yscale="log")
    figure.savefig(folder / "stability-language-model.png", dpi=120)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    report_runs(args, finished_runs(args, SETTINGS, runs(args), train), table, plot)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
