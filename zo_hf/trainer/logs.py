"""The numbers that the engine adds to a line of the training log."""

from __future__ import annotations

from zo_hf.directions import UnitVectors
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.estimate import Estimate
from zo_hf.stability.monitor import StabilityMonitor
from zo_hf.subspaces import Folded


def engine_logs(zo: ZerothOrder, estimate: Estimate, monitor: StabilityMonitor | None) -> dict[str, float]:
    """Return the `zo/...` entries of a line that reports a training loss.

    Args:
        zo: the engine.
        estimate: the estimate of the last step.
        monitor: the monitor of stability; None without one.
    """
    gradients = estimate.projected_gradients
    logs: dict[str, float] = {
        "zo/projected_grad": sum(gradients) / zo.estimator.num_directions,  # of all groups of rows together
        "zo/forward_passes": zo.forward_passes,
        "zo/skipped_steps": zo.skipped_steps,
    }
    if zo.row_groups is not None:
        logs |= zo.row_groups.logs()
    if zo.rounding_noise is not None:
        logs["zo/rounding_noise"] = zo.rounding_noise
    if monitor is not None:
        logs |= monitor.logs()
    if isinstance(zo.distribution, UnitVectors):
        logs["zo/cycles"] = zo.distribution.cycles(zo.step)
    logs |= zo.rule.logs()
    if isinstance(zo.subspace, Folded) and zo.subspace.fold_error is not None:
        logs["zo/fold_error"] = zo.subspace.fold_error
    return logs


def reports_evaluation(logs: dict[str, float]) -> bool:
    """Return whether a line reports an evaluation: it has a runtime, and not that of the training."""
    return any(key.endswith("_runtime") for key in logs) and "train_runtime" not in logs
