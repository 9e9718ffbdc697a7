# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Measure the rounding error of projected gradients in half precision, against the slope of the same weights in float32.

    python recipes/probe_precision.py                     # SmolLM2-135M, embedded; needs no hub
    python recipes/probe_precision.py --model MODEL --dtypes bfloat16 float16 --labels everywhere

For every distance ε, `error` is the root mean square of c minus the slope along its direction, divided by that of the
slopes. Two estimates of it need no float32 model: they compare c at ε with c at a distance close by, ε/2 or 0.9·ε.
`loss` is the error of one loss, in units of its size times the resolution of the dtype.

Products of half-precision matrices are accumulated in float32 and rounded once, as on a GPU. Many CPUs are slow at them,
so they are computed in float32 here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common.experiments import encoded_reviews
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from zo_hf import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_file

SUBSPACES = ("low_rank", "full", "LoRA")
LABELS = ("last", "everywhere")
#: Distances in float32 at which curvature and rounding are both small, so that c is the slope.
EXACT = {"low_rank": 1e-3, "full": 1e-3, "LoRA": 1e-2}
CLOSE = (0.5, 0.9)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a causal language model, a folder or a name; default: the embedded SmolLM2-135M")
    add("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16"), help="dtypes (%(default)s)")
    add("--subspaces", nargs="+", default=list(SUBSPACES), choices=SUBSPACES, help="what moves (%(default)s)")
    add("--labels", default="last", choices=LABELS, help="which tokens are labels (%(default)s)")
    add("--directions", type=int, default=24, help="number of directions (%(default)s)")
    add("--rows", type=int, default=4, help="sentences in the batch (%(default)s)")
    distances = [1e-3, 3e-3, 1e-2, 3e-2]
    add("--distances", type=float, nargs="+", default=distances, help="distances ε (%(default)s)")
    add("--output", type=Path, help="file for the table")
    args = parser.parse_args(arguments)
    if args.output is not None:
        check_file("--output", args.output)
    path = args.model or str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    batch = batch_of(tokenizer, model, args.rows, args.labels)
    lines = [
        "| dtype | what moves | ε | slope, root mean square | error | correlation | by ε/2 | by 0.9·ε | loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for dtype in args.dtypes:
        for subspace in tqdm(args.subspaces, unit="subspace"):
            lines += rows_of_table(model, batch, dtype, subspace, args.distances, args.directions)
    if args.output is not None:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def batch_of(tokenizer: Any, model: nn.Module, rows: int, labels: str) -> dict[str, Any]:
    """Return the batch: embedded sentences, with a label word at the end or with all tokens as labels."""
    sentences, _ = encoded_reviews(tokenizer, rows, rows, 0, words=range(8, 13))
    if labels == "last":
        return dict(LabelWordCollator(tokenizer, model)(list(sentences)))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows_of_ids = [{"input_ids": row["input_ids"]} for row in sentences]
    return dict(DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows_of_ids))


def rows_of_table(
    model: nn.Module, batch: dict[str, Any], dtype: str, subspace: str, distances: Sequence[float], directions: int
) -> list[str]:
    """Return the rows for one subspace in one dtype."""
    rounded = copy.deepcopy(model).to(getattr(torch, dtype))
    exact = engine(copy.deepcopy(rounded).float(), subspace)
    slopes, _ = projected_gradients(exact, batch, EXACT[subspace], directions)
    half, lines = engine(rounded, subspace), []
    signal = slopes.square().mean().sqrt()
    for eps in distances:
        with products_in_float32():
            found, losses = projected_gradients(half, batch, eps, directions)
            others = [projected_gradients(half, batch, eps * factor, directions)[0] for factor in CLOSE]
        error = found - slopes
        # The error of c at a distance f·ε is 1/f times as large.
        estimates = [
            (found - other).square().mean().div(1 + factor**-2).sqrt() / signal
            for factor, other in zip(CLOSE, others, strict=True)
        ]
        _, without = projected_gradients(exact, batch, eps, directions)
        of_loss = (losses - without).std() / (without.abs().mean() * torch.finfo(getattr(torch, dtype)).eps)
        correlation = torch.corrcoef(torch.stack((slopes, found)))[0, 1]
        numbers = [error.square().mean().sqrt() / signal, correlation, *estimates, of_loss]
        line = f"| {dtype} | {subspace} | {eps:g} | {signal:.3g} | {' | '.join(f'{n:.3f}' for n in numbers)} |"
        tqdm.write(line)
        lines.append(line)
    return lines


def engine(model: nn.Module, subspace: str) -> ZerothOrder:
    """Return an engine around a model, with a LoRA adapter if that is what moves."""
    if subspace == "LoRA":
        torch.manual_seed(0)  # the adapter begins at random, and must be the same in every dtype
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
        return ZerothOrder(model.eval(), "adapter", rows_per_direction=0)
    return ZerothOrder(model, subspace, direction="rademacher", rows_per_direction=0)


def projected_gradients(zo: ZerothOrder, batch: dict[str, Any], eps: float, directions: int) -> tuple[Tensor, Tensor]:
    """Return c along the directions of step 0, float64 (directions,), and the losses behind them, (2 · directions,)."""
    inner: Any = zo.model.get_base_model() if zo.subspace.name == "adapter" else zo.model  # type: ignore[operator]
    loss = ModelLoss(zo.model, inner, batch, lambda inputs: zo.model(**inputs).loss)
    probes = [Probe(index, sign * eps) for index in range(directions) for sign in (1, -1)]
    losses = torch.tensor(zo.losses_at([(loss, 1.0)], probes), dtype=torch.float64)
    return (losses[::2] - losses[1::2]) / (2 * eps), losses


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Accumulate the products of half-precision linear layers in float32 while the context is open."""
    own = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return own(x, weight, bias)
        return own(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    nn.functional.linear = linear
    try:
        yield
    finally:
        nn.functional.linear = own


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
