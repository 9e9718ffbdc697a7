"""Two pictures of a search for a learning rate: how the loss rises along directions, and what is predicted of runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zo_hf.stability.find_learning_rate import FoundRate
from zo_hf.stability.loss_probes import RISE


def plot_found(found: FoundRate, path: Path) -> None:
    """Draw them and write them to `path`, whose suffix chooses the format; of a rate that was found, not of a default."""
    # Imported here, and drawn on a bare Figure: no display is needed and no global backend is chosen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    assert found.probes is not None and found.prediction is not None
    probes, prediction, loss = found.probes, found.prediction, found.probes.loss
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    along, ahead = figure.subplots(1, 2)

    distances = np.array([line.distance for line in probes.lines])
    along.plot(distances, [line.rise for line in probes.lines], "o", label="measured, a direction each")
    curvature, _ = probes.curvature
    line = np.geomspace(distances.min() / 10, distances.max() * 2, 100)  # a decade at least, for the ticks
    along.plot(line, curvature * line**2 / 2, color="gray", label="½·δ²·Tr H")
    along.axhline(RISE * loss, color="gray", linestyle=":", label=f"{RISE:.0%} of the loss")
    along.set_xscale("log")
    along.xaxis.set_minor_formatter(NullFormatter())
    along.set_yscale("symlog", linthresh=0.01 * loss)
    along.set_xlabel("distance δ along a direction")
    along.set_ylabel("rise of the loss")
    along.legend(fontsize="small")

    ahead.fill_between(prediction.rates, prediction.low, prediction.high, alpha=0.2, label="eight in ten")
    ahead.plot(prediction.rates, prediction.losses, label="predicted, the mean")
    ahead.axhline(loss, color="black", linestyle=":", linewidth=0.8, label="before training")
    ahead.axvline(found.learning_rate, color="tab:red", label=f"learning rate {found.learning_rate:.2g}")
    ahead.set_xscale("log")
    ahead.set_xlim(found.learning_rate / 300, found.learning_rate * 100)
    ahead.set_xlabel("learning rate")
    ahead.set_ylabel("loss at the end of the run")
    ahead.legend(fontsize="small")
    figure.savefig(path, dpi=150)
