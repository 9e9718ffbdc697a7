"""Monitoring of a run's distance from the edge of mean-square stability, from its own probes (arXiv 2604.14669).

Over the last measured steps, κ = zᵀHz has mean Tr H, and a variance that depends on the norm of H:

    gaussian   Var κ = 2·‖H‖²              sphere   Var κ = (2d·‖H‖² - 2·Tr²) / (d + 2)            ‖H‖ = Frobenius norm

    for H ⪰ 0:   ‖H‖²/Tr  ≤  λmax  ≤  ‖H‖  ≤  Tr

`critical.py` has a lower bound on the critical learning rate that needs λmax. With ‖H‖ in place of λmax it remains a lower
bound. With ‖H‖²/Tr in place of λmax it becomes an upper bound, closer than 2/Tr. The upper bound is attained if all
eigenvalues that are not zero are equal. The reason:

    F(η) = Σᵢ c₀·aᵢ·(1 + β) / (2·(1 - β²) - aᵢ·k),  aᵢ = η·λᵢ

is a mean, with weights λᵢ/Tr, of a convex function of λᵢ. By Jensen's inequality it is at least that function of the mean
of λᵢ, which is ‖H‖²/Tr.

With random signs, the variance of κ does not contain the diagonal of H; their bounds assume that λmax lies between 0 and
Tr. With mini-batches, the variance includes that of the batches' Hessians, which makes ‖H‖ too large. The true critical
learning rate is then below the one found here, so a ratio below 1 does not guarantee that a run learns.

With directions for G groups of rows, κ is the sum over groups of z_gᵀH_g z_g, each with its share of the Hessian, H = Σ_g
H_g. Its mean is Tr H, and its variance 2·Σ_g ‖H_g‖², which is 2·‖H‖²/G for H_g = H/G: that of a mean over G directions. So
q·G takes the place of q. Rows whose Hessians differ make ‖H‖ too large, as batches do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.curvature_probes import CurvatureProbes
from zo_hf.stability.actions import check_action
from zo_hf.stability.critical import step_size_bounds
from zo_hf.stability.descent import AdamPreconditioner, Descent, descent_of
from zo_hf.stability.measured import Measured, variance

logger = logging.getLogger(__name__)


# A learning rate beyond the edge is lowered to this fraction of the lower bound on the critical one.
SAFETY = 0.8

# The variance of fewer samples is too uncertain.
_LEAST_SAMPLES = 4


@dataclass(frozen=True)
class Stability:
    """The monitor's estimates of a run's curvature and stability.

    Args:
        trace: trace of the Hessian H in the run's coordinates; for an optimizer like Adam, of the preconditioned H.
        lambda_max: an upper bound on the largest eigenvalue of H.
        critical_lower, critical_upper: bounds on the critical learning rate, in units of the run's `learning_rate`;
            infinite if the trace is not positive.
        ratio: the learning rate divided by the upper bound.
    """

    trace: Measured
    lambda_max: float
    critical_lower: float
    critical_upper: float
    ratio: float

    @property
    def crossed(self) -> bool:
        """True if the ratio exceeds 1 by more than the relative error of the trace, which is one half for one sample."""
        error = self.trace.standard_error if self.trace.count > 1 else self.trace.value / 2
        return self.ratio * (1.0 - error / self.trace.value) > 1.0 if self.trace.value > 0 else False


def stability(
    curvatures: Sequence[float],
    learning_rate: float,
    descent: Descent | None = None,
    *,
    measured_directions: int = 1,
    num_directions: int = 1,
    direction: str = "gaussian",
    dimension: int | None = None,
) -> Stability:
    """Compute the critical learning rate from samples of κ, and compare a learning rate with it.

    Args:
        curvatures: κ of independent steps, each a mean over `measured_directions`.
        learning_rate: η.
        descent: describes the optimizer's steps; None is plain SGD.
        measured_directions: number of directions in each sample of κ.
        num_directions: q, the number of directions that the gradient estimate averages.
        direction: "gaussian", "sphere" or "rademacher".
        dimension: d, the number of coordinates, which only "sphere" needs.
    """
    descent = Descent() if descent is None else descent
    trace = Measured.of(curvatures)
    least, most = 0.0, trace.value if trace.value > 0 else math.inf
    if len(curvatures) >= _LEAST_SAMPLES and direction != "rademacher":
        spread = measured_directions * variance(curvatures)
        if direction == "sphere":
            assert dimension is not None
            spread = spread * (dimension + 2) / dimension + 2.0 * trace.value**2 / dimension
        square = spread / 2.0
        least, most = min(square / trace.value, trace.value) if trace.value > 0 else 0.0, square**0.5
    if trace.value <= 0:
        return Stability(trace, most, math.inf, math.inf, 0.0)
    theory = "gaussian" if direction == "rademacher" else direction  # Gaussian noise is at least that of signs
    lower, upper = (
        step_size_bounds(
            trace.value,
            eigenvalue,
            momentum=descent.momentum,
            ema=descent.ema,
            num_directions=num_directions,
            direction=theory,
            dimension=dimension,
        )[0]
        / descent.factor
        for eigenvalue in (most, least)
    )
    return Stability(trace, most, lower, upper, learning_rate / upper)


class StabilityMonitor:
    """Measures the curvature at some steps of an engine, and warns of a learning rate that is too large or lowers it.

        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-4))
        monitor = StabilityMonitor(zo, optimizer, every=10, action="cap")
        ...                                                # any number of steps
        monitor.found.ratio

    With "cap", once a run was beyond the edge, every step's learning rate is at most `SAFETY` times the lower bound on the
    critical one. Outside of `optimizer.step()`, the parameter groups keep the schedule's learning rates.

    Args:
        zo: the engine, after `prepare`.
        optimizer: the optimizer that moves the engine's coordinates.
        every: steps between measurements. A measurement costs one forward pass. With Adam it costs three, or two if the
            estimator evaluates the clean loss.
        action: "warn" or "cap".

    Attributes:
        found: the estimates as of the last step; None before the first measurement.

    Raises:
        ValueError: an argument cannot be used, or the theory does not cover the method; the message names it.
    """

    def __init__(self, zo: ZerothOrder, optimizer: Optimizer, every: int = 10, action: str = "warn") -> None:
        check_action(every, action)
        check(Case(zo.settings, {"zo_stability_steps": every}, distribution=zo.distribution))
        if zo.optimizer is not optimizer:  # the engine must record the learning rate after it was lowered
            raise ValueError("optimizer is not the engine's; pass it to zo.prepare first.")
        self._descent = descent_of(optimizer)
        if self._descent.divides and zo.rule.name != "none":
            raise ValueError(
                f"zo_stability_steps knows no critical learning rate of zo_rule={zo.rule.name!r} with "
                f"{type(optimizer).__name__}; use optim='sgd', or leave zo_stability_steps out."
            )

        self._zo, self._optimizer, self._action = zo, optimizer, action
        preconditioner = AdamPreconditioner(optimizer, zo.subspace.coordinates) if self._descent.divides else None
        self.probes = zo.curvature = CurvatureProbes(zo.estimator, every, preconditioner)
        self.found: Stability | None = None
        self._capped_at: float | None = None
        self._scheduled: list[float] = []
        self._warned: set[str] = set()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def detach(self) -> None:
        """Stop monitoring."""
        self._zo.curvature = None
        for hook in self._hooks:
            hook.remove()

    def logs(self) -> dict[str, float]:
        """Return the estimates under the names that a Trainer logs, and the learning rate if it was lowered."""
        found = self.found
        if found is None:
            return {}
        named = {
            "zo/hessian_trace": found.trace.value,
            "zo/hessian_trace_error": found.trace.standard_error,
            "zo/lambda_max": found.lambda_max,
            "zo/critical_lr_lower": found.critical_lower,
            "zo/critical_lr_upper": found.critical_upper,
            "zo/stability_ratio": found.ratio,
        }
        if self._capped_at is not None:
            named["learning_rate"] = self._capped_at
        return {name: value for name, value in named.items() if math.isfinite(value)}

    def _before_step(self) -> None:
        groups = self._optimizer.param_groups
        self._scheduled = [group["lr"] for group in groups]
        if not self.probes.curvatures:
            return
        rate = max(float(rate) for rate in self._scheduled)
        found = self._at(rate)
        self._warn_if_rounding_dominates()
        self._warn_if_crossed(found, rate)
        if self._action == "cap" and self.probes.crossed:
            cap = SAFETY * found.critical_lower
            for group in groups:
                if float(group["lr"]) > cap:
                    group["lr"] = cap
            self._capped_at = cap if rate > cap else None
            found = self._at(min(rate, cap))
        self.found = found

    def _after_step(self) -> None:
        # The engine's own hook runs first, and has recorded the step's learning rate by now.
        for group, rate in zip(self._optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = rate

    def _at(self, rate: float) -> Stability:
        zo, factor = self._zo, self._descent.factor
        if zo.normalization is not None and zo.normalization.root > 0:
            factor /= zo.normalization.root * zo.groups**0.5
        name = zo.distribution.name
        return stability(
            self.probes.curvatures,
            rate,
            Descent(self._descent.momentum, self._descent.ema, factor, self._descent.divides),
            measured_directions=self.probes.num_directions * zo.groups,
            num_directions=zo.estimator.num_directions * zo.groups,
            direction=name if name in ("sphere", "rademacher") else "gaussian",
            dimension=zo.subspace.dimension,
        )

    def _warn_if_crossed(self, found: Stability, rate: float) -> None:
        if not found.crossed:
            if found.ratio < 1.0:
                self._warned.discard("crossed")
            return
        self.probes.crossed = True
        if "crossed" in self._warned:
            return
        self._warned.add("crossed")
        safe = SAFETY * found.critical_lower
        if self._action == "cap":
            reaction = f"it is lowered to {safe:.2g}"
        else:
            reaction = f"lower it to at most {safe:.2g}, or set zo_stability_action='cap', which lowers it for you"
        logger.warning(
            "step %d: learning_rate=%.2g is %.2g times the largest at which this run is stable (Hessian trace %.3g ± %.2g, "
            "critical learning rate %.2g to %.2g); %s.",
            self._zo.step,
            rate,
            found.ratio,
            found.trace.value,
            found.trace.standard_error,
            found.critical_lower,
            found.critical_upper,
            reaction,
        )

    def _warn_if_rounding_dominates(self) -> None:
        probes = self.probes
        if "rounding" in self._warned or len(probes.curvatures) < _LEAST_SAMPLES:
            return
        if 2.0 * probes.rounding**2 > variance(probes.curvatures):
            self._warned.add("rounding")
            logger.warning(
                "step %d: the curvature that zo_stability_steps measures is mostly the rounding of the %s losses "
                "(about %.2g in each sample, of a mean of %.2g); raise zo_eps=%g, or return losses in float32 or better.",
                self._zo.step,
                str(self._zo.evaluator.dtype_of_computation(self._zo.subspace, self._zo.evaluator.dtype))[6:],
                probes.rounding,
                Measured.of(probes.curvatures).value,
                self._zo.estimator.eps,
            )


class StabilityCallback(TrainerCallback):
    """Monitors the stability of a `ZOTrainer`; `zo_stability_steps` adds it, and `callbacks` may contain one.

    Args:
        every: steps between measurements.
        action: "warn" or "cap".

    Attributes:
        monitor: the monitor of the last training; None before the first one.
    """

    def __init__(self, every: int = 10, action: str = "warn") -> None:
        check_action(every, action)
        self.every, self.action = every, action
        self.monitor: StabilityMonitor | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a method that the monitor cannot measure."""
        config: Any = args
        check(Case(config.settings(), {"zo_stability_steps": self.every}))

    def watch(self, zo: ZerothOrder, optimizer: Optimizer) -> None:
        """Start to measure an engine's steps."""
        self.monitor = StabilityMonitor(zo, optimizer, self.every, self.action)
