"""One picture of a search for a learning rate: how the loss rises along directions, and where the bounds are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zo_hf.stability.find_learning_rate import FoundRate
from zo_hf.stability.loss_probes import RISE


def plot_found(found: FoundRate, path: Path) -> None:
    """Draw it and write it to `path`, whose suffix chooses the format; `found.probes` is there."""
    # Imported here, and drawn on a bare Figure: no display is needed and no global backend is chosen.
    from matplotlib.figure import Figure

    assert found.probes is not None
    probes = found.probes
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    unit = found.rate_of_distance if np.isfinite(found.rate_of_distance) else 1.0
    distances = np.array([probe.distance for probe in probes.range])
    axes.plot(distances * unit, [probe.rise for probe in probes.range], "o", label="measured, a direction each")
    curvature, _ = probes.curvature
    line = np.geomspace(distances.min() / 4, distances.max(), 100)
    axes.plot(line * unit, curvature * line**2 / 2, color="gray", label="½·δ²·Tr H")
    axes.axhline(RISE * abs(probes.loss), color="gray", linestyle=":", label=f"{RISE:.0%} of the loss")
    for style, (name, bound) in zip(("--", "-.", ":"), found.bounds.items(), strict=False):
        axes.axvline(bound, color="black", linestyle=style, linewidth=1, label=f"{name}: {bound:.2g}")
    axes.axvline(found.learning_rate, color="tab:red", label=f"learning rate {found.learning_rate:.2g}")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01 * abs(probes.loss) or 1.0)
    axes.set_xlabel("learning rate whose noise leads a run so far")
    axes.set_ylabel("rise of the loss")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
