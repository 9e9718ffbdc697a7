# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,quantization]"]
# ///
"""Compare c with the slope of the loss along the step that is then taken, over many architectures.

    python recipes/architectures.py                       # all of them, about ten minutes on a CPU
    python recipes/architectures.py --only Mamba Deberta

Every model is tiny, made from a config, and in float64. A step is taken, and its direction is read from the weights that
it wrote. The loss is then evaluated at these weights ± ε times the direction. A parameter that a step moves, and that no
probe has moved, makes the slope differ from c. The table also shows the parameters that no step moves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common.tiny_models import ARCHITECTURES, Architecture
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm

from zo_hf import ZerothOrder
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

EPS, SEEDS = 1e-3, 2
WAYS = ("low_rank", "full", "LoRA")


@dataclass(frozen=True)
class Comparison:
    """The result for one architecture and one way of training it.

    Args:
        error: largest |c - slope| over the seeds, relative to the largest |slope|.
        moved: number of the model's parameters that a step moves, as a share of those that could move.
        unmoved: names of the trainable tensors that no step moves.
    """

    error: float
    moved: float
    unmoved: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of models in transformers")
    chosen = parser.parse_args(arguments)
    logging.getLogger("zo_hf").setLevel(logging.ERROR)
    architectures = [a for a in ARCHITECTURES if a.model.startswith(tuple(chosen.only))]
    print(table(architectures))


def table(architectures: Sequence[Architecture]) -> str:
    """Return a table in Markdown: the error of every way, and the parameters that do not move."""
    lines = ["| kind | model | low_rank | full | LoRA | does not move |", "|---|---|---|---|---|---|"]
    for architecture in tqdm(architectures, unit="model", leave=False):
        results = {way: compare(architecture, way) for way in WAYS}
        errors = " | ".join(f"{result.error:.0e}" for result in results.values())
        unmoved = _unmoved(results)
        lines.append(f"| {architecture.kind} | `{architecture.model}` | {errors} | {unmoved} |")
    return "\n".join(lines)


def compare(architecture: Architecture, way: str, seeds: int = SEEDS) -> Comparison:
    """Take one step with each of several seeds, and compare c with the slope along it.

    Args:
        architecture: the architecture.
        way: one of `WAYS`.
        seeds: number of seeds.
    """
    model = architecture.make()
    if way == "LoRA":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=architecture.lora)).double()  # type: ignore[arg-type]
    batch = architecture.batch()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    # LoRA's A does not move at first, so it is not among those that could move.
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n}
    found, moved = [], set()
    for seed in range(seeds):
        c = _step(model, batch, way, seed)
        if c == 0.0:
            raise RuntimeError(f"c is 0 for {architecture.model} and {way}")
        step = {name: (p.detach() - start[name]) / -c for name, p in model.named_parameters()}
        moved |= {name for name, z in step.items() if z.any()}
        ends = []
        for sign in (1, -1):
            for name, p in model.named_parameters():
                p.data.copy_(start[name] + sign * EPS * step[name])
            with torch.no_grad():
                ends.append(model(**batch).loss.item())
        found.append((c, (ends[0] - ends[1]) / (2 * EPS)))
        for name, p in model.named_parameters():
            p.data.copy_(start[name])
    largest = max(abs(slope) for _, slope in found) or float("nan")
    error = max(abs(c - slope) for c, slope in found) / largest
    unmoved = tuple(name for name in trainable if name not in moved)
    total = sum(p.numel() for p in trainable.values())
    return Comparison(error, sum(trainable[n].numel() for n in trainable if n in moved) / total, unmoved)


def _step(model: nn.Module, batch: dict, way: str, seed: int) -> float:
    zo = ZerothOrder(model, "adapter" if way == "LoRA" else way, seed=seed, eps=EPS, batched_probes=False)
    groups = zo.coordinates()
    optimizer = (
        SeededSGD(groups, zo.subspace, lr=1.0) if isinstance(zo.subspace, Full) else torch.optim.SGD(groups, lr=1.0)
    )
    zo.prepare(optimizer)
    c = zo.estimate(lambda: model(**batch).loss).projected_gradients[0]
    optimizer.step()
    zo.finish()
    return c


def _unmoved(results: dict[str, Comparison]) -> str:
    parts = []
    for way, result in results.items():
        if result.unmoved and way != "low_rank":  # it moves the same parameters as full
            share, count = f"{100 * (1 - result.moved):.2g} %", len(result.unmoved)
            names = ", ".join(f"`{name.removeprefix('base_model.model.')}`" for name in result.unmoved[:2])
            parts.append(f"{way}: {share}, {names}" + (f" and {count - 2} more" if count > 2 else ""))
    return "; ".join(parts)


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
