# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Does a language model reach the edge of stability? (arXiv 2604.14669 has none; forward passes alone.)

    python recipes/edge_of_stability_language_model.py                      # SmolLM2-135M, embedded; some hours of one core
    python recipes/edge_of_stability_language_model.py --model MODEL --subspaces low_rank --steps 2000
    python recipes/edge_of_stability_language_model.py --plot-only --figures docs/figures

One batch of sentences is all the data there is, so that no noise but the directions' is left, and zeroth-order gradient
descent (SGD, no momentum) lowers the model's own loss of the label word on it, in a low-rank subspace that is never folded,
or in a LoRA adapter. The step size is the lower bound on the critical one, 2/(Tr + 2‖H‖), of the model as it begins,
divided by a margin. The stability monitor measures the trace and ‖H‖, which is at least λmax, along the way.

OUTPUT gets runs.jsonl, from which an interrupted comparison continues, and table.md; FIGURES gets
stability-language-model.png: where the band [Tr, Tr + 2‖H‖] comes up to the dashed 2/η, a run is at the edge.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf import ZerothOrder
from zo_hf.stability.curvature import hessian_trace
from zo_hf.stability.monitor import ACTIONS, StabilityMonitor
from zo_hf.subspaces import Adapter, LowRank
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.experiments import FinishedRuns, encoded_reviews
from zo_hf.tasks.prompts import LabelWordCollator

ASKED = ("model", "subspace", "margin", "steps", "sentences", "every", "action", "seed")
SUBSPACES = ("low_rank", "lora")
#: Directions along which the curvature is measured before the first step.
DIRECTIONS_BEFORE = 24
LOST = 10.0  # a run whose loss is this many times that of the start has diverged


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a causal model, a folder or a name; default: the embedded SmolLM2-135M")
    add("--subspaces", nargs="+", choices=SUBSPACES, default=list(SUBSPACES), help="(all)")
    add("--margins", type=float, nargs="+", default=[0.7, 1.5, 4.0], help="bound / η at the start (%(default)s)")
    add("--steps", type=int, default=1000, help="of a run (%(default)s)")
    add("--sentences", type=int, default=8, help="in the one batch (%(default)s)")
    add("--every", type=int, default=5, help="steps between measurements (%(default)s)")
    add("--action", choices=ACTIONS, default="warn", help="of the monitor beyond the edge (%(default)s)")
    add("--seed", type=int, default=0, help="of sentences, directions and the adapter (%(default)s)")
    add("--output", type=Path, default=Path("out/edge_of_stability_language_model"), help="folder (%(default)s)")
    add("--figures", type=Path, help="folder of the figure (OUTPUT)")
    add("--plot-only", action="store_true", help="make the table and the figure of the runs that there are")
    args = parser.parse_args(words)
    for option in ("steps", "sentences", "every"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)} must be at least 1.")
    if min(args.margins) <= 0:
        parser.error(f"--margins {min(args.margins)} must be above 0.")
    args.model = args.model or str(default_model())
    args.figures = args.figures or args.output
    return args


def train(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One run, and what was measured along it."""
    torch.set_num_threads(1)
    seed = asked["seed"]
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    rows, _ = encoded_reviews(tokenizer, asked["sentences"], 1, seed, range(8, 13))
    batch = LabelWordCollator(tokenizer, model)(list(rows))
    model, subspace = with_subspace(model, asked["subspace"], seed)

    def closure() -> torch.Tensor:
        return model(**batch).loss

    zo = ZerothOrder(model, subspace, seed=seed, batched=False)
    start = hessian_trace(zo, closure, DIRECTIONS_BEFORE)
    norm = start.standard_error * math.sqrt(start.count / 2)
    rate = 2 / (start.value + 2 * norm) / asked["margin"]
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=rate))
    monitor = StabilityMonitor(zo, optimizer, asked["every"], asked["action"])
    began, losses, curve = time.process_time(), [], []
    for step in range(asked["steps"]):
        losses.append(zo.estimate(closure).loss)
        optimizer.step()
        found = monitor.found
        if step % asked["every"] == 0 and found is not None and math.isfinite(losses[-1]):
            trace = {"trace": found.trace.value, "error": found.trace.standard_error, "norm": found.lambda_max}
            curve.append({"step": step, "loss": losses[-1]} | trace)
        if not losses[-1] < LOST * losses[0]:
            break
    return dict(asked) | {
        "learning_rate": rate,
        "dimension": subspace.dimension,
        "initial_trace": start.value,
        "initial_trace_error": start.standard_error,
        "initial_norm": norm,
        "curve": curve,
        "losses": losses,
        "forward_passes": zo.forward_passes,
        "seconds": time.process_time() - began,
    }


def with_subspace(model: Any, name: str, seed: int) -> tuple[nn.Module, Any]:
    """The model, with an adapter if need be, and the coordinates that move: the same ones throughout a run."""
    if name == "low_rank":
        return model, LowRank(model, seed=seed, fold_steps=0, exclude_modules=r".*(embed|norm).*")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # PEFT draws the adapter from torch's own generator
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model, Adapter(model, seed=seed)


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the arguments ask for."""
    shared = {name: getattr(args, name) for name in ("model", "steps", "sentences", "every", "action", "seed")}
    for subspace in args.subspaces:
        for margin in args.margins:
            yield shared | {"subspace": subspace, "margin": margin}


def table(found: list[dict[str, Any]]) -> str:
    """Where the runs begin and end; η·(Tr + 2‖H‖)/2 and η·Tr/2 are 1 at the bounds of the edge."""
    lines = [
        "| subspace | margin | η | loss | Tr | ‖H‖ | η·Tr/2 at the end | its maximum | η·(Tr + 2‖H‖)/2 at the end | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for run in found:
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


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Loss above, and the band of the trace beside its threshold below; a column for each subspace."""
    from matplotlib.figure import Figure

    subspaces = list(dict.fromkeys(run["subspace"] for run in found))
    figure = Figure(figsize=(5 * len(subspaces), 6), layout="constrained")
    panels = figure.subplots(2, len(subspaces), squeeze=False, sharex=True)
    for column, subspace in enumerate(subspaces):
        above, below = panels[:, column]
        for color, run in enumerate(run for run in found if run["subspace"] == subspace):
            steps = [point["step"] for point in run["curve"]]
            traces = [point["trace"] for point in run["curve"]]
            tops = [point["trace"] + 2 * point["norm"] for point in run["curve"]]
            label = f"η = {run['learning_rate']:.1e} (margin {run['margin']:g})"
            above.plot(run["losses"], color=f"C{color}", linewidth=0.7, label=label)
            below.fill_between(steps, traces, tops, color=f"C{color}", alpha=0.25, linewidth=0)
            below.plot(steps, traces, color=f"C{color}", linewidth=1)
            below.axhline(2 / run["learning_rate"], color=f"C{color}", linestyle="--", linewidth=1)
        above.set(title=subspace, ylabel="loss", ylim=(0, 1.5 * found[0]["losses"][0]))
        above.legend(fontsize="x-small")
        below.set(xlabel="step", ylabel="Tr to Tr + 2‖H‖, and 2/η (dashed)", yscale="log")
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    finished = FinishedRuns(args.output / "runs.jsonl", ASKED)
    if not args.plot_only:
        for asked in tqdm([asked for asked in runs(args) if finished.find(asked) is None], unit="run"):
            finished.add(train(asked))
    found = [run for asked in runs(args) if (run := finished.find(asked)) is not None]
    if not found:
        print("no run is finished yet")
        return
    text = table(found)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    args.figures.mkdir(parents=True, exist_ok=True)
    plot(found, args.figures / "stability-language-model.png")
    print(text)


if __name__ == "__main__":
    main()
