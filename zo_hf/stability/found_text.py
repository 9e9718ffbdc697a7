"""What a search for a learning rate saw, in words."""

from __future__ import annotations

import math

from zo_hf.stability.find_learning_rate import FoundRate
from zo_hf.stability.loss_probes import LossProbes, RangeProbe

_MEANS = {
    "noise": "what the noise of all steps may add up to",
    "mini-batch": "half of 2|g|^2/E[c^2 z'Hz], |g|^2 two standard errors up",
    "curvature": "half of the critical step of the whole loss",
}


def one_line(found: FoundRate) -> str:
    """The rate, what bound it, and what it took."""
    spent = f"{found.forward_passes} forward passes"
    if not found.bounds:
        return f"{found.learning_rate:.3g}, the default, after {spent}"
    return f"{found.learning_rate:.3g}, bound by {found.bound_by}, to a factor of {found.factor:.2g}, from {spent}"


def rises(probes: LossProbes) -> list[tuple[float, float, float, int]]:
    """Rise of the loss by distance: (distance, mean, standard error, number of probes), probes within a factor of 2 in one."""
    ordered = sorted(probes.range, key=lambda probe: probe.distance)
    groups: list[list[RangeProbe]] = []
    for probe in ordered:
        if not groups or probe.distance > 2 * groups[-1][0].distance:
            groups.append([])
        groups[-1].append(probe)
    found = []
    for group in groups:
        count = len(group)
        mean = sum(probe.rise for probe in group) / count
        squares = sum((probe.rise - mean) ** 2 for probe in group)
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
        found.append((sum(probe.distance for probe in group) / count, mean, error, count))
    return found


def table(found: FoundRate) -> str:
    """Everything that was measured, and every bound, a line each."""
    lines: list[str] = []
    probes = found.probes
    if probes is not None:
        gradient_square, error = probes.gradient_square
        curvature, curvature_error = probes.curvature
        lines += [
            f"loss       {probes.loss:.4g}",
            f"slopes     E[c^2] {probes.slope_square:.3g}, of which batches {probes.batch_variance:.3g}; "
            f"|g|^2 {gradient_square:.3g} +- {error:.2g}, from {len(probes.slopes)} directions",
            f"curvature  Tr H {curvature:.3g} +- {curvature_error:.2g}, largest about {probes.largest_curvature:.2g}, "
            f"from {len(probes.range)} directions",
            "",
            f"{'rate':>10} {'distance':>10} {'rise of the loss':>23} probes; noise leads so far in a run at that rate",
        ]
        lines += [
            f"{found.rate_of_distance * distance:>10.2g} {distance:>10.2g} {rise:>+11.2g} "
            + (f"+- {error:<8.1g} {count:>6}" if count > 1 else f"{count:>18}")
            for distance, rise, error, count in rises(probes)
        ]
        lines.append("")
    if found.bounds:
        lines.append(f"{'rate':>10} bound")
        for name, bound in sorted(found.bounds.items(), key=lambda item: item[1]):
            mark = "  <- binds" if name == found.bound_by else ""
            lines.append(f"{bound:>10.3g} {name}: {_MEANS[name]}{mark}")
        lines.append("")
    lines.append(f"learning rate {one_line(found)}")
    lines += [f"not sure: {doubt}" for doubt in found.doubts] or ["sure, as far as a run is like its beginning"]
    return "\n".join(lines)
