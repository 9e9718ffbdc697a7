"""Text reports of a learning rate search."""

from __future__ import annotations

import math
from bisect import bisect_left

from zo_hf.lr_finder.find import LRFinderResult, Prediction
from zo_hf.lr_finder.loss_probes import LineProbe, LossProbes

#: The rates that a table shows, as multiples of the chosen rate.
_SHOWN_MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0)


def one_line(result: LRFinderResult) -> str:
    """Return the rate, its standard error and the cost of the search, in one line."""
    spent = f"{result.forward_passes} forward passes"
    if result.prediction is None:
        return f"{result.learning_rate:.3g}, the default, after {spent}"
    rows = f", for {result.groups} groups of rows with directions of their own" if result.groups > 1 else ""
    return f"{result.learning_rate:.3g}, to within a factor of {result.factor:.2g}, from {spent}{rows}"


def rises(probes: LossProbes) -> list[tuple[float, float, float, int]]:
    """Return the rise of the loss by distance, with distances within a factor of 2 in one group.

    Returns:
        For each group, its mean distance, mean rise, standard error of that mean, and number of directions.
    """
    ordered = sorted(probes.lines, key=lambda line: line.distance)
    groups: list[list[LineProbe]] = []
    for line in ordered:
        if not groups or line.distance > 2 * groups[-1][0].distance:
            groups.append([])
        groups[-1].append(line)
    rows = []
    for group in groups:
        count = len(group)
        mean = sum(line.rise for line in group) / count
        squares = sum((line.rise - mean) ** 2 for line in group)
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
        rows.append((sum(line.distance for line in group) / count, mean, error, count))
    return rows


def table(result: LRFinderResult) -> str:
    """Return the measurements, the predicted losses, the rate and its warnings, as lines of text."""
    lines: list[str] = []
    probes = result.probes
    if probes is not None:
        gradient_square, error = probes.gradient_square
        curvature, curvature_error = probes.curvature
        lines += [
            f"loss       {probes.loss:.4g}",
            f"slopes     E[c^2] {probes.slope_square:.3g}, |g|^2 {gradient_square:.3g} +- {error:.2g}, "
            f"from {len(probes.lines)} directions, two batches each",
            f"curvature  Tr H {curvature:.3g} +- {curvature_error:.2g}, largest about {probes.largest_curvature:.2g}",
            "",
            f"{'distance':>10} {'rise of the loss':>23} directions",
        ]
        lines += [
            f"{distance:>10.2g} {rise:>+11.2g} " + (f"+- {error:<8.1g} {count:>6}" if count > 1 else f"{count:>18}")
            for distance, rise, error, count in rises(probes)
        ]
        lines.append("")
    if result.prediction is not None:
        lines.append(f"{'rate':>10} {'predicted final loss':>27}    10%, 90% quantile")
        lines += _prediction_rows(result.prediction, result.learning_rate)
        lines.append("")
    lines.append(f"learning rate {one_line(result)}")
    lines += [f"warning: {warning}" for warning in result.warnings] or [
        "no warnings; the prediction assumes that the loss keeps the shape it has now"
    ]
    return "\n".join(lines)


def _prediction_rows(prediction: Prediction, rate: float) -> list[str]:
    lines, rates = [], prediction.rates
    for multiple in _SHOWN_MULTIPLES:
        index = bisect_left(rates, 0.999 * multiple * rate)
        if index == len(rates) or rates[index] > 1.2 * multiple * rate:
            continue  # outside the range of candidates
        mark = "  <- lowest" if multiple == 1.0 else ""
        lines.append(
            f"{rates[index]:>10.2g} {prediction.losses[index]:>27.3g}    "
            f"{prediction.low[index]:.3g}, {prediction.high[index]:.3g}{mark}"
        )
    return lines
