"""Watching how near a run is to the edge of mean-square stability, from its own probes (arXiv 2604.14669).

Of κ = zᵀHz over the last measured steps the mean is Tr H and the spread says how large H is besides:

    gaussian   Var κ = 2·‖H‖²              sphere   Var κ = (2d·‖H‖² - 2·Tr²) / (d + 2)            ‖H‖ = Frobenius norm

    for H ⪰ 0:   ‖H‖²/Tr  ≤  λmax  ≤  ‖H‖  ≤  Tr

The right one in place of λmax in the lower bound on the critical learning rate, see `critical.py`, leaves a lower bound.
The left one makes an upper bound of it, closer than 2/Tr and attained where all eigenvalues that are not zero are equal:

    F(η) = Σᵢ c₀·aᵢ·(1 + β) / (2·(1 - β²) - aᵢ·k),  aᵢ = η·λᵢ

is a mean, with weights λᵢ/Tr, of a convex function of λᵢ, which is at least that function of the mean of λᵢ, ‖H‖²/Tr.

Random signs do not show the diagonal of H in the spread of κ; their bounds take λmax to lie between 0 and Tr. With
mini-batches the spread includes that of their Hessians, which makes ‖H‖ too large, and the true critical learning rate is
below what is found here: that the ratio is below 1 does not say that a run learns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zo_hf.directions import GivenMask, Sparse
from zo_hf.probes.curvature import MEASURED, CurvatureProbes
from zo_hf.stability.critical import step_size_bounds
from zo_hf.stability.descent import AdamPreconditioner, Descent, descent_of
from zo_hf.stability.measured import Measured, variance
from zo_hf.zeroth_order import ZerothOrder

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "cap")
RULES = ("none", "curvature")
DIRECTIONS = ("gaussian", "rademacher", "sphere", Sparse.name, GivenMask.name)

# What a learning rate that is beyond the edge is lowered to, in terms of the lower bound on the critical one.
SAFETY = 0.8

# Of fewer samples the spread says too little.
_LEAST_SAMPLES = 4


@dataclass(frozen=True)
class Stability:
    """What the monitor knows.

    Args:
        trace: of the Hessian in the coordinates of the run, divided by what its optimizer divides by.
        lambda_max: an upper bound on its largest eigenvalue.
        critical_lower, critical_upper: bounds on the critical learning rate, as `learning_rate` means it; infinite where
            the trace is not positive.
        ratio: of the learning rate to the upper bound.
    """

    trace: Measured
    lambda_max: float
    critical_lower: float
    critical_upper: float
    ratio: float

    @property
    def crossed(self) -> bool:
        """Whether the ratio is above 1, by more than the error of the trace; of one sample that is taken for one half."""
        error = self.trace.standard_error if self.trace.count > 1 else self.trace.value / 2
        return self.ratio * (1.0 - error / self.trace.value) > 1.0 if self.trace.value > 0 else False


def check_stability(estimator: str, rule: str, direction: str) -> None:
    """Refuse to watch a method whose steps the theory knows nothing of, or whose probes show no curvature.

    Raises:
        ValueError: the message names the option and what to use instead.
    """
    for option, value, choices in (
        ("zo_estimator", estimator, MEASURED),
        ("zo_rule", rule, RULES),
        ("zo_direction", direction, DIRECTIONS),
    ):
        if value not in choices:
            raise ValueError(
                f"zo_stability_steps knows no critical learning rate of {option}={value!r}; use "
                f"{' or '.join(map(repr, choices))}, or leave zo_stability_steps out."
            )


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
    """What samples of κ say about a learning rate.

    Args:
        curvatures: κ of independent steps, each a mean over `measured_directions`.
        learning_rate: η.
        descent: how the optimizer makes a step; None is plain SGD.
        num_directions: q, of which the estimate is a mean.
        direction: "gaussian", "sphere" or "rademacher".
        dimension: d, which only "sphere" needs.
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
    theory = "gaussian" if direction == "rademacher" else direction  # whose noise is at least that of signs
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
    """Measures the curvature at some steps of an engine, and says or sees to it that its learning rate is not too large.

        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-4))
        monitor = StabilityMonitor(zo, optimizer, every=10, action="cap")
        ...                                                # any number of steps
        monitor.found.ratio

    With "cap", once the run was beyond the edge, no step has a larger learning rate than `SAFETY` times the lower bound on
    the critical one. Outside of `optimizer.step()` the parameter groups have what a schedule gave them.

    Args:
        zo: the engine, after `prepare`.
        optimizer: which moves its coordinates.
        every: steps between measurements, each of which costs one forward pass, or three with Adam (two where the
            estimator evaluates the clean loss).
        action: "warn" or "cap".

    Attributes:
        found: what is known since the last step; None before the first measurement.

    Raises:
        ValueError: an argument is not usable, or the theory knows nothing of the method; the message names it.
    """

    def __init__(self, zo: ZerothOrder, optimizer: Optimizer, every: int = 10, action: str = "warn") -> None:
        check_action(every, action)
        check_stability(zo.estimator.name, zo.rule.name, zo.distribution.name)
        if zo.optimizer is not optimizer:  # whose learning rate the engine records, after it was lowered
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
        self._said: set[str] = set()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def detach(self) -> None:
        """Watch no longer."""
        self._zo.curvature = None
        for hook in self._hooks:
            hook.remove()

    def logs(self) -> dict[str, float]:
        """What is known, under the names that a Trainer logs; the learning rate too if it is not the schedule's."""
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
        self._say_if_rounding_dominates()
        self._say_if_crossed(found, rate)
        if self._action == "cap" and self.probes.crossed:
            cap = SAFETY * found.critical_lower
            for group in groups:
                if float(group["lr"]) > cap:
                    group["lr"] = cap
            self._capped_at = cap if rate > cap else None
            found = self._at(min(rate, cap))
        self.found = found

    def _after_step(self) -> None:
        # The engine's own hook came first and has recorded the learning rate of the step.
        for group, rate in zip(self._optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = rate

    def _at(self, rate: float) -> Stability:
        zo, factor = self._zo, self._descent.factor
        if zo.normalisation is not None and zo.normalisation.root > 0:
            factor /= zo.normalisation.root
        name = zo.distribution.name
        return stability(
            self.probes.curvatures,
            rate,
            Descent(self._descent.momentum, self._descent.ema, factor, self._descent.divides),
            measured_directions=self.probes.num_directions,
            num_directions=zo.estimator.num_directions,
            direction=name if name in ("sphere", "rademacher") else "gaussian",
            dimension=zo.subspace.dimension,
        )

    def _say_if_crossed(self, found: Stability, rate: float) -> None:
        if not found.crossed:
            if found.ratio < 1.0:
                self._said.discard("crossed")
            return
        self.probes.crossed = True
        if "crossed" in self._said:
            return
        self._said.add("crossed")
        safe = SAFETY * found.critical_lower
        done = (
            f"it is lowered to {safe:.2g}"
            if self._action == "cap"
            else (f"lower it to at most {safe:.2g}, or have that done with zo_stability_action='cap'")
        )
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
            done,
        )

    def _say_if_rounding_dominates(self) -> None:
        probes = self.probes
        if "rounding" in self._said or len(probes.curvatures) < _LEAST_SAMPLES:
            return
        if 2.0 * probes.rounding**2 > variance(probes.curvatures):
            self._said.add("rounding")
            logger.warning(
                "step %d: the curvature that zo_stability_steps measures is mostly the rounding of the losses, which are "
                "%s (about %.2g in each, of a mean of %.2g); raise zo_eps=%g, or return losses in float32 or better.",
                self._zo.step,
                str(self._zo.evaluator.dtype).removeprefix("torch."),
                probes.rounding,
                Measured.of(probes.curvatures).value,
                self._zo.estimator.eps,
            )


def check_action(every: int, action: str) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: the message names the option.
    """
    if every < 1:
        raise ValueError(f"zo_stability_steps={every} must be at least 1; leave it out to measure nothing.")
    if action not in ACTIONS:
        raise ValueError(f"zo_stability_action={action!r} is unknown; choose one of {', '.join(ACTIONS)}.")


class StabilityCallback(TrainerCallback):
    """The monitor of a `ZOTrainer`: what `zo_stability_steps` and `zo_stability_action` add, or a list of callbacks.

    Args:
        every: steps between measurements.
        action: "warn" or "cap".

    Attributes:
        monitor: while training runs, and until the next one; None before.
    """

    def __init__(self, every: int = 10, action: str = "warn") -> None:
        check_action(every, action)
        self.every, self.action = every, action
        self.monitor: StabilityMonitor | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say in the arguments, too, what a budget has to pay for."""
        settings: Any = args
        check_stability(settings.zo_estimator, settings.zo_rule, settings.zo_direction)
        settings.zo_stability_steps, settings.zo_stability_action = self.every, self.action

    def watch(self, zo: ZerothOrder, optimizer: Optimizer) -> None:
        """Measure this engine's steps."""
        self.monitor = StabilityMonitor(zo, optimizer, self.every, self.action)
