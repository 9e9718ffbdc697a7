"""What a search for a learning rate saw, in words."""

from __future__ import annotations

import math
from bisect import bisect_left

from zo_hf.stability.find_learning_rate import FoundRate, Prediction
from zo_hf.stability.loss_probes import LineProbe, LossProbes

#: Rates that a table shows, in terms of the one that was found.
_BESIDE = (0.1, 0.3, 1.0, 3.0, 10.0)


def one_line(found: FoundRate) -> str:
    """The rate, how sure it is, and what it took."""
    spent = f"{found.forward_passes} forward passes"
    if found.prediction is None:
        return f"{found.learning_rate:.3g}, the default, after {spent}"
    return f"{found.learning_rate:.3g}, to a factor of {found.factor:.2g}, from {spent}"


def rises(probes: LossProbes) -> list[tuple[float, float, float, int]]:
    """Rise of the loss by distance: (distance, mean, standard error, number of lines), lines within a factor of 2 in one."""
    ordered = sorted(probes.lines, key=lambda line: line.distance)
    groups: list[list[LineProbe]] = []
    for line in ordered:
        if not groups or line.distance > 2 * groups[-1][0].distance:
            groups.append([])
        groups[-1].append(line)
    found = []
    for group in groups:
        count = len(group)
        mean = sum(line.rise for line in group) / count
        squares = sum((line.rise - mean) ** 2 for line in group)
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
        found.append((sum(line.distance for line in group) / count, mean, error, count))
    return found


def table(found: FoundRate) -> str:
    """Everything that was measured, and what is expected of runs, a line each."""
    lines: list[str] = []
    probes = found.probes
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
    if found.prediction is not None:
        lines.append(f"{'rate':>10} {'loss predicted for the end':>27}    one in ten below, above")
        lines += _predicted(found.prediction, found.learning_rate)
        lines.append("")
    lines.append(f"learning rate {one_line(found)}")
    lines += [f"not sure: {doubt}" for doubt in found.doubts] or ["sure, as far as a run is like its beginning"]
    return "\n".join(lines)


def _predicted(prediction: Prediction, rate: float) -> list[str]:
    lines, rates = [], prediction.rates
    for factor in _BESIDE:
        index = bisect_left(rates, 0.999 * factor * rate)
        if index == len(rates) or rates[index] > 1.2 * factor * rate:
            continue  # beyond those that were looked at
        mark = "  <- least" if factor == 1.0 else ""
        lines.append(
            f"{rates[index]:>10.2g} {prediction.losses[index]:>27.3g}    "
            f"{prediction.low[index]:.3g}, {prediction.high[index]:.3g}{mark}"
        )
    return lines
