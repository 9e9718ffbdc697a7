"""A plot of a learning rate search: the rise of the loss along directions, and the predicted final losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zo_hf.lr_finder.find import LRFinderResult
from zo_hf.lr_finder.loss_probes import TARGET_RISE


def plot_result(result: LRFinderResult, path: Path) -> None:
    """Draw a result that has a prediction, and save it to `path`; the suffix selects the format."""
    # Imported here, and drawn on a bare Figure, so that no display is needed and no global backend is chosen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    assert result.probes is not None and result.prediction is not None
    probes, prediction, loss = result.probes, result.prediction, result.probes.loss
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    measured, predicted = figure.subplots(1, 2)

    distances = np.array([line.distance for line in probes.lines])
    measured.plot(distances, [line.rise for line in probes.lines], "o", label="measured, one point a direction")
    curvature, _ = probes.curvature
    line = np.geomspace(distances.min() / 10, distances.max() * 2, 100)  # at least a decade, for the ticks
    measured.plot(line, curvature * line**2 / 2, color="gray", label="½·δ²·Tr H")
    measured.axhline(TARGET_RISE * loss, color="gray", linestyle=":", label=f"{TARGET_RISE:.0%} of the loss")
    measured.set_xscale("log")
    measured.xaxis.set_minor_formatter(NullFormatter())
    measured.set_yscale("symlog", linthresh=0.01 * loss)
    measured.set_xlabel("distance δ along a direction")
    measured.set_ylabel("rise of the loss")
    measured.legend(fontsize="small")

    predicted.fill_between(prediction.rates, prediction.low, prediction.high, alpha=0.2, label="10 % to 90 % quantile")
    predicted.plot(prediction.rates, prediction.losses, label="predicted mean")
    predicted.axhline(loss, color="black", linestyle=":", linewidth=0.8, label="before training")
    predicted.axvline(result.learning_rate, color="tab:red", label=f"learning rate {result.learning_rate:.2g}")
    predicted.set_xscale("log")
    predicted.set_xlim(result.learning_rate / 300, result.learning_rate * 100)
    predicted.set_xlabel("learning rate")
    predicted.set_ylabel("loss at the end of the run")
    predicted.legend(fontsize="small")
    figure.savefig(path, dpi=150)
