# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]", "matplotlib"]
# ///
"""Measure the errors of projected gradients in half precision, against the slope of the same weights in float32.

    python recipes/probe_precision.py                     # SmolLM2-135M, embedded; needs no hub
    python recipes/probe_precision.py --model MODEL ENCODER --dtypes bfloat16 float16 --figure error.png

A causal language model predicts the label words of sentences, or all of their tokens. Any other model gets a classifier at
random, and predicts their labels.

For every distance ε, `rounding` is the root mean square of c minus c in float32, and `bend` that of c in float32 minus the
slope along its direction, both divided by that of the slopes. Two estimates of `rounding` need no float32 model: they
compare c at ε with c at a distance close by, ε/2 or 0.9·ε. `loss` is the error of one loss, in units of its size times the
resolution of the dtype.

Products of half-precision matrices are accumulated in float32 and rounded once, as on a GPU. Many CPUs are slow at them,
so they are computed in float32 here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.experiments import encoded_reviews
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zo_hf import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_file

SUBSPACES = ("low_rank", "full", "LoRA")
LABELS = ("last", "everywhere")
#: A distance in float32 at which curvature and rounding are both small, so that c is the slope.
EXACT = 3e-4
CLOSE = (0.5, 0.9)
WORDS = range(8, 13)


@dataclass(frozen=True)
class Errors:
    """The errors of c at one distance; the module's docstring defines them.

    Attributes:
        signal: root mean square of the slopes.
        correlation: that of c with the slopes.
        close: the estimates of the rounding by another distance, in the order of `CLOSE`.
    """

    model: str
    dtype: str
    subspace: str
    eps: float
    signal: float
    rounding: float
    bend: float
    correlation: float
    close: tuple[float, ...]
    loss: float

    def line(self) -> str:
        """Return the row of the table."""
        numbers = [self.rounding, self.bend, self.correlation, *self.close, self.loss]
        names = f"| {self.model} | {self.dtype} | {self.subspace} | {self.eps:g} | {self.signal:.3g} |"
        return f"{names} {' | '.join(f'{n:.3f}' for n in numbers)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", help="folders or names of models; default: the embedded SmolLM2-135M")
    add("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16"), help="dtypes (%(default)s)")
    add("--subspaces", nargs="+", default=list(SUBSPACES), choices=SUBSPACES, help="what moves (%(default)s)")
    add("--labels", default="last", choices=LABELS, help="which tokens are labels of a language model (%(default)s)")
    add("--directions", type=int, default=24, help="number of directions (%(default)s)")
    add("--rows", type=int, default=4, help="sentences in the batch (%(default)s)")
    distances = [1e-3, 3e-3, 1e-2, 3e-2]
    add("--distances", type=float, nargs="+", default=distances, help="distances ε (%(default)s)")
    add("--output", type=Path, help="file for the table")
    add("--figure", type=Path, help="file for a plot of rounding and bend against ε")
    args = parser.parse_args(arguments)
    for option in ("output", "figure"):
        if getattr(args, option) is not None:
            check_file(f"--{option}", getattr(args, option))
    lines = [
        "| model | dtype | what moves | ε | slope | rounding | bend | correlation | by ε/2 | by 0.9·ε | loss |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    results: list[Errors] = []
    for path in args.model or [str(default_model())]:
        model, batch = loaded(path, args.rows, args.labels)
        for dtype in args.dtypes:
            for subspace in tqdm(args.subspaces, unit="subspace"):
                for errors in measured(
                    Path(path).name, model, batch, dtype, subspace, args.distances, args.directions
                ):
                    tqdm.write(errors.line())
                    results.append(errors)
    if args.output is not None:
        args.output.write_text("\n".join([*lines, *(errors.line() for errors in results)]) + "\n", encoding="utf-8")
    if args.figure is not None:
        draw(results, args.figure)


def loaded(path: str, rows: int, labels: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in float32 and its batch of embedded sentences."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    if not set(config.architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        torch.manual_seed(0)  # the classifier begins at random
        classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        examples = embedded_reviews(rows, rows, 0, WORDS).train
        batch = dict(tokenizer(list(examples["text"]), padding=True, return_tensors="pt"))
        return classifier.eval(), batch | {"labels": torch.tensor(list(examples["label"]))}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sentences, _ = encoded_reviews(tokenizer, rows, rows, 0, WORDS)
    if labels == "last":
        return model, dict(LabelWordCollator(tokenizer, model)(list(sentences)))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows_of_ids = [{"input_ids": row["input_ids"]} for row in sentences]
    return model, dict(DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows_of_ids))


def measured(
    name: str,
    model: nn.Module,
    batch: dict[str, Any],
    dtype: str,
    subspace: str,
    distances: Sequence[float],
    directions: int,
) -> Iterator[Errors]:
    """Yield the errors of one subspace in one dtype, a distance at a time."""
    rounded = copy.deepcopy(model).to(getattr(torch, dtype))
    exact = engine(copy.deepcopy(rounded).float(), subspace)
    slopes, _ = projected_gradients(exact, batch, EXACT, directions)
    half = engine(rounded, subspace)
    signal = slopes.square().mean().sqrt()
    for eps in distances:
        with products_in_float32():
            found, losses = projected_gradients(half, batch, eps, directions)
            others = [projected_gradients(half, batch, eps * factor, directions)[0] for factor in CLOSE]
        # The error of c at a distance f·ε is 1/f times as large.
        close = [
            (found - other).square().mean().div(1 + factor**-2).sqrt() / signal
            for factor, other in zip(CLOSE, others, strict=True)
        ]
        bent, without = projected_gradients(exact, batch, eps, directions)
        of_loss = (losses - without).std() / (without.abs().mean() * torch.finfo(getattr(torch, dtype)).eps)
        yield Errors(
            model=name,
            dtype=dtype,
            subspace=subspace,
            eps=eps,
            signal=float(signal),
            rounding=float((found - bent).square().mean().sqrt() / signal),
            bend=float((bent - slopes).square().mean().sqrt() / signal),
            correlation=float(torch.corrcoef(torch.stack((slopes, found)))[0, 1]),
            close=tuple(float(estimate) for estimate in close),
            loss=float(of_loss),
        )


def engine(model: nn.Module, subspace: str) -> ZerothOrder:
    """Return an engine around a model, with a LoRA adapter if that is what moves."""
    if subspace == "LoRA":
        torch.manual_seed(0)  # the adapter begins at random, and must be the same in every dtype
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16))
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


def draw(results: Sequence[Errors], path: Path) -> None:
    """Draw the errors of c against ε: a panel for what moves, solid lines for rounding, dashed ones for the bend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    subspaces = list(dict.fromkeys(errors.subspace for errors in results))
    runs = list(dict.fromkeys((errors.model, errors.dtype) for errors in results))
    figure, axes = plt.subplots(1, len(subspaces), figsize=(4.2 * len(subspaces), 3.4), sharey=True, squeeze=False)
    for axis, subspace in zip(axes[0], subspaces, strict=True):
        for index, run in enumerate(runs):
            chosen = [e for e in results if e.subspace == subspace and (e.model, e.dtype) == run]
            distances = [e.eps for e in chosen]
            axis.plot(distances, [e.rounding for e in chosen], "o-", color=f"C{index}", label=" ".join(run))
            axis.plot(distances, [e.bend for e in chosen], "--", color=f"C{index}", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="ε", title=subspace)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("rounding (solid), bend (dashed) / slope")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
