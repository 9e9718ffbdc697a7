"""Rounding of what a fold makes of quantized weights: W ← quantize(decay · decode(W) + f(ξ)).

stochastic   every element goes to one of its two neighbors, so that the expectation is exact
gptq         elements make up for each other's errors in the layer's outputs, see `zo_hf.quantization.gptq`

For the latter, a causal model writes text at θ(ξ) and reads it, see `own_text`; any other model reads random tokens. It
reads in one forward pass for all layers. The new codes wait in the memory of the host until that pass is over: every
layer reads the weights of before the fold, and an error leaves all of them unwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.quantization import QuantizedLayer
from zo_hf.quantization.gptq import ErrorFeedback
from zo_hf.quantization.layer import squares
from zo_hf.rng import Purpose, Stream
from zo_hf.rng.rounding import draw_uniform
from zo_hf.subspaces.layer_inputs import first_input
from zo_hf.subspaces.own_text import sample_text, writes_text
from zo_hf.subspaces.random_tokens import LENGTH, Look, check_reads_tokens, random_tokens, read_tokens, refusing
from zo_hf.subspaces.sites import Site

ROUNDINGS = ("stochastic", "gptq")
_OPTION, _WAY_OUT = "zo_fold_rounding='gptq'", "zo_fold_rounding='stochastic'"

#: Rows that the model reads before a fold, each of 32 tokens.
ROWS = 16

#: Returns the new values of some rows of a weight, float32 (stop - start, n), given its storage, `start` and `stop`.
NewRows = Callable[[dict[str, Tensor], int, int], Tensor]


@dataclass(frozen=True)
class Rounded:
    """A new quantized weight.

    Attributes:
        storage: its parts, by name, in the memory of the host.
        error: sum of the squared rounding errors.
        weight: sum of the squared exact values.
    """

    storage: dict[str, Tensor]
    error: float
    weight: float

    def write(self, storage: Mapping[str, Tensor]) -> tuple[float, float]:
        """Copy the parts into `storage`, and return the two sums."""
        for name, part in self.storage.items():
            storage[name].copy_(part)
        return self.error, self.weight


def check_rounding(rounding: str, model: nn.Module, sites: Sequence[Site], folds: bool) -> None:
    """Refuse a rounding that nothing of a model can take.

    Args:
        rounding: one of `ROUNDINGS`.
        model: the model.
        sites: what moves.
        folds: True if the moving codes are written.

    Raises:
        ValueError: gptq is asked for, and no codes are written, or the model cannot read tokens alone.
    """
    if rounding != "gptq":
        return
    if not folds or all(site.layer is None for site in sites):
        raise ValueError(
            f"{_OPTION} rounds folds into 8-bit and 4-bit weights, and this run has none; leave it out, or "
            "fold a quantized model with zo_fold_steps=100."
        )
    check_reads_tokens(model, _OPTION, _WAY_OUT)
    # A fold comes after many steps, which a model that cannot read tokens alone would lose.
    read_tokens(model, _calibration(model, 1, 3, Stream(0)), [], _OPTION, _WAY_OUT)


def round_stochastically(
    storage: dict[str, Tensor], layer: QuantizedLayer, new_rows: NewRows, name: str, stream: Stream
) -> tuple[float, float]:
    """Write a new weight into `storage`, rounded by random bits of the stream.

    Returns:
        The sum of the squared rounding errors, and the sum of the squared exact values.
    """
    columns, sums = layer.shape[1], _Sums()
    for start, stop in layer.tiles():
        rows = new_rows(storage, start, stop)
        uniform = draw_uniform(stream, name, start * columns, stop * columns, rows.device).view(rows.shape)
        layer.requantize(storage, start, stop, rows, uniform)
        sums.add(layer.dequantize(storage, start, stop), rows)
    return sums.error, sums.weight


def round_by_inputs(
    model: nn.Module, sites: Sequence[Site], new_rows: Callable[[Site], NewRows], seed: int, step: int
) -> dict[str, Rounded]:
    """Round new weights by the inputs of their layers; nothing is written.

    Args:
        model: the model at the point that is folded.
        sites: the quantized weights.
        new_rows: gives the new rows of a site.
        seed: seed of the run.
        step: step of the fold.

    Returns:
        The new weights, by name. A layer is left out if the tokens do not reach it, such as one of another tower,
        or if its inputs are not finite.

    Raises:
        ValueError: the model cannot read tokens alone.
    """
    rounded: dict[str, Rounded] = {}
    shared: list[ErrorFeedback] = []  # of the last layer, whose inputs the next may read as well

    def look_of(site: Site, layer: QuantizedLayer) -> Look:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = first_input(args, kwargs)
            x = x.reshape(-1, x.shape[-1])
            if site.name in rounded or not x.isfinite().all():
                return
            if not shared or not _are_equal(shared[0].inputs, x):
                shared[:] = [ErrorFeedback(x)]
            rounded[site.name] = _round(layer, shared[0], new_rows(site))

        return look

    looks = [(site.layer.module, look_of(site, site.layer)) for site in sites if site.layer is not None]
    stream = Stream(seed, step, purpose=Purpose.ROUNDING)
    read_tokens(model, _calibration(model, ROWS, LENGTH, stream), looks, _OPTION, _WAY_OUT)
    return rounded


def _calibration(model: nn.Module, rows: int, length: int, stream: Stream) -> dict[str, Tensor]:
    """Return what the model reads: text of its own, or random tokens if it writes none."""
    if not writes_text(model):
        return random_tokens(model, rows, length, stream)
    with refusing(model, _OPTION, _WAY_OUT):
        return sample_text(model, rows, length, stream)


def _round(layer: QuantizedLayer, feedback: ErrorFeedback, new_rows: NewRows) -> Rounded:
    storage, sums = {name: part.clone() for name, part in layer.storage().items()}, _Sums()
    for start, stop in layer.tiles():
        rows = new_rows(storage, start, stop)
        layer.make_room(storage, start, stop, rows)
        nearest = feedback.round(rows, layer.nearest(storage, start, stop))
        layer.write(storage, start, stop, nearest, torch.full(rows.shape, 1 << 15, device=rows.device))
        sums.add(nearest, rows)
    return Rounded({name: part.cpu() for name, part in storage.items()}, sums.error, sums.weight)


def _are_equal(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and x.dtype == other.dtype and x.device == other.device and torch.equal(x, other)


class _Sums:
    """The squared rounding errors and the squared exact values of a weight's tiles so far."""

    def __init__(self) -> None:
        self.error, self.weight = 0.0, 0.0

    def add(self, stored: Tensor, exact: Tensor) -> None:
        """Add a tile."""
        error, weight = squares(stored, exact)
        self.error += error
        self.weight += weight
