"""The engine: one step of zeroth-order optimization on any `nn.Module`, with any closure and any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_hf import kernels
from zo_hf.case import Case, facts_of_model
from zo_hf.compatibility import check, rows_per_direction
from zo_hf.directions import Distribution
from zo_hf.estimators.estimate import Estimate, Step
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.curvature_probes import CurvatureProbes
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.evaluation.flat_loss import FlatLossWarning
from zo_hf.evaluation.pass_graphs import PassGraphs
from zo_hf.evaluation.private_rows import PrivateRows
from zo_hf.evaluation.rows import RowGroups
from zo_hf.evaluation.step_losses import LossSum, StepLosses, WeightedLoss
from zo_hf.evaluation.step_randomness import StepRandomness
from zo_hf.parallel.ranks import Ranks
from zo_hf.parallel.signals import make_steps_whole
from zo_hf.rng import Stream, StreamOf
from zo_hf.rng.global_generators import GlobalGenerators
from zo_hf.rules import ScalarNormalization
from zo_hf.rules.step_probes import forward_passes_of_a_step, probes_of_a_step
from zo_hf.settings import Settings, method_of
from zo_hf.subspaces import SUBSPACES, Subspace
from zo_hf.subspaces.folds import Folds
from zo_hf.subspaces.reports import report_what_stays
from zo_hf.subspaces.settled_reads import SettledReads


class ZerothOrder:
    """Estimates gradients of a model's loss from forward passes and hands them to an optimizer.

        zo = ZerothOrder(model, seed=0)
        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-4))
        for batch in data:
            estimate = zo.estimate(lambda: loss_function(model(batch)))
            optimizer.step()
        model = zo.finish()

    Args:
        model: any module; the engine does not change its mode (train or eval).
        settings: the method, see `Settings`; or the subspace alone, by name or as an object made for this model.
        subspace: the subspace, by name or as an object made for this model. Default: the settings'.
        direction: the distribution of directions, by name or as an object made for this subspace. Default: the settings'.
        ranks: the processes that train together, made with `zo_hf.parallel.ranks.make_grid`. Their weights must be equal
            (`Ranks.broadcast`). Default: this process alone.
        replays: True if the engine will only replay steps; the estimator then need not be able to probe the model.
        batched: a short name of the option `batched_probes`.
        options: fields of `Settings`, in place of `settings`.

    Attributes:
        on_step: called with a `Step` after every optimizer step; None calls nothing.
        curvature: measures the curvature in some steps, and keeps the results; None measures nothing.
        private: makes the numbers of private training; None if training is not private.
        rounding_noise: the part of c that was rounding when the run began, see `zo_hf.stability.rounding_noise`.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """

    on_step: Callable[[Step], None] | None = None
    curvature: CurvatureProbes | None = None
    rounding_noise: float | None = None

    def __init__(
        self,
        model: nn.Module,
        settings: Settings | Subspace | str | None = None,
        *,
        subspace: Subspace | str | None = None,
        direction: Distribution | str | None = None,
        ranks: Ranks | None = None,
        replays: bool = False,
        batched: bool | str | None = None,
        **options: Any,
    ) -> None:
        if batched is not None:
            options["batched_probes"] = batched
        settings, subspace, own_distribution = method_of(settings, subspace, direction, options)
        if not replays:
            settings.estimator_kind.check_model(model)
        name = settings.subspace_of(model) if subspace is None else subspace.name
        if name in SUBSPACES:  # else the subspace is of the caller's own kind
            settings = replace(settings, subspace=name)
        case = Case(settings, {}, facts_of_model(model), own_distribution, subspace)
        check(case)
        is_auto = settings.rows_per_direction == "auto"
        if subspace is None:
            subspace = settings.make_subspace(model)
        rows, one_grid = rows_per_direction(case), ranks is None or ranks.grid.directions == 1
        if is_auto and not (one_grid and subspace.takes_groups_cheaply):
            rows = 0
        settings = replace(settings, rows_per_direction=rows)
        self.model, self.subspace, self.settings, self.seed = model, subspace, settings, settings.seed
        self._chooses_kernels = not replays
        self._choose_kernels()
        self.estimator = settings.make_estimator(subspace.default_eps)
        self.distribution = settings.make_distribution(subspace, own_distribution)
        self.rule = settings.rule_kind(subspace, self.estimator, settings)
        self.max_projected_grad = settings.max_projected_grad_of(subspace, self.estimator)
        self.normalization = ScalarNormalization() if settings.normalize else None
        self.evaluator = ProbeEvaluator(False if self.estimator.needs_tangents else settings.batched_probes)
        self.ranks = ranks if ranks is not None else Ranks()
        self.evaluator.graphs = PassGraphs(subspace) if settings.cuda_graph and not replays else None
        self.evaluator.all_reduce_and = self.ranks.all_reduce_and
        self.step, self.skipped_steps = 0, 0
        self._optimizer: Optimizer | None = None
        self._losses = StepLosses(subspace, self.evaluator, self.ranks)
        self._sum, self._curvature_sum = LossSum(self.ranks), LossSum(self.ranks)
        self._batches: list[WeightedLoss] = []
        self._clean_loss: float | None = None
        self._applied: tuple[tuple[float, ...], bool] | None = None
        self._folds = Folds(subspace)
        self._flat_loss = FlatLossWarning()
        self._reads = SettledReads(subspace, self.ranks)
        # A step that looks back takes the directions of earlier steps, and cannot tell which of those rows have shared.
        every = settings.noise_scale_steps if self.rule.points == 1 else 0
        mechanism, evaluates = settings.make_mechanism(), (subspace, self.evaluator, self.ranks)
        self.private = None if mechanism is None else PrivateRows(*evaluates, self.estimator, mechanism, rows)
        self.row_groups = RowGroups(*evaluates, rows, is_auto, every) if rows and mechanism is None else None
        self._begins_to_move: list[str] = []
        subspace.attach()
        if not replays:
            report_what_stays(subspace)

    def saved_settings(self) -> dict[str, Any]:
        """The settings as resolved for this model, under the names of the options; a resumed run must have the same."""
        return self.settings.resolved(self.subspace, self.estimator, self.distribution, self.max_projected_grad)

    def coordinates(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: one with weight decay, and one without it (norms and biases)."""
        return self.subspace.parameter_groups(weight_decay)

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Register the optimizer that moves the coordinates; every optimizer step then ends a step of the engine.

        Raises:
            ValueError: the rule does not work with this optimizer; the message says which to use instead.
        """
        self.rule.check_optimizer(optimizer)
        self._optimizer = optimizer
        optimizer.register_step_post_hook(lambda *_: self._advance())
        make_steps_whole(optimizer)
        return optimizer

    def estimate(self, closure: Callable[[], Any]) -> Estimate:
        """Probe the loss around the current point, and prepare the estimated gradient for `optimizer.step()`.

        Args:
            closure: evaluates the model and returns a scalar loss, or `RowLosses`. It is called once per probe, on the same
                batch; with `rows_per_direction`, a few more times in the first step.
        """
        self.probe(closure)
        return self.finish_estimate()

    def probe(self, closure: Callable[[], Any], weight: float | Tensor = 1.0) -> Tensor:
        """Add one micro-batch to the step; returns its losses at this rank's probes, times `weight`: (probes,).

        In private training, it returns none: (0,).
        """
        random = self.begin()
        if self.private is not None:  # whose rows have a divisor of their own
            self.private.evaluate(closure, self._probes(), random, self.step)
            return torch.zeros(0)
        batch = WeightedLoss(closure, weight, random)
        if self.rule.candidates:
            self._batches.append(batch)
        if self.row_groups is not None:
            found = self.row_groups.evaluate(closure, self._probes(), random, weight)
            if found is not None:
                more = self.row_groups.evaluate_more
                self._measure_curvature(lambda at: more(closure, at, random, weight))
                return found
        losses = self._losses.own(batch, self._probes())
        self._sum.add(losses)
        self._measure_curvature(lambda at: self._losses.own(batch, at))
        return losses

    def _measure_curvature(self, losses_at: Callable[[Sequence[Probe]], Tensor]) -> None:
        """Add the losses of a micro-batch at the probes of a measured step; in other steps do nothing."""
        probes = self._curvature_probes
        if self.curvature is not None and probes is not None:
            with self.curvature.along(self.subspace):
                self._curvature_sum.add(losses_at(probes))

    @property
    def _curvature_probes(self) -> Sequence[Probe] | None:
        # Where groups share their directions in pairs, the samples would have another variance.
        in_pairs = self.row_groups is not None and self.row_groups.noise_scale.due(self.step)
        is_due = self.curvature is not None and self.curvature.due(self.step) and not in_pairs
        return self.curvature.probes if self.curvature is not None and is_due else None

    def losses_at(
        self,
        batches: Sequence[tuple[Callable[[], Any], float | Tensor]],
        probes: Sequence[Probe],
        stream_of: StreamOf | None = None,
        distribution: Distribution | None = None,
    ) -> list[float]:
        """Return the mean losses of all ranks at points outside of any step; only the run's count of passes changes.

        Args:
            batches: closures of a step's micro-batches, as for `estimate`, and the weight of each.
            probes: the points, evaluated one after another.
            stream_of: the stream of each direction index; None takes the step's.
            distribution: the distribution of directions; None takes the step's.
        """
        random = self.begin(stream_of, distribution)
        # The first step makes the choice that batched_probes="auto" stands for, not this evaluation.
        batched, self.evaluator.batched = self.evaluator.batched, False
        try:
            return self._losses.mean_at([WeightedLoss(*batch, random) for batch in batches], probes)
        finally:
            self.evaluator.batched = batched
            random.restore()

    def _probes(self) -> list[Probe]:
        return probes_of_a_step(self.estimator, type(self.rule), self.rule.options, self.step)

    def begin(self, stream_of: StreamOf | None = None, distribution: Distribution | None = None) -> StepRandomness:
        """Prepare for evaluations of the loss, and return their random numbers.

        Args:
            stream_of: the stream of each direction index; None takes the step's.
            distribution: the distribution of directions; None takes the step's.
        """
        self._choose_kernels()
        self.distribution.begin()
        return StepRandomness(stream_of or self._stream, distribution or self.distribution, self._generators())

    def _choose_kernels(self) -> None:
        if self._chooses_kernels:  # another engine may have chosen since
            kernels.choose(self.settings.kernels, self.subspace.device)

    def _generators(self) -> GlobalGenerators | None:
        return GlobalGenerators.now(self.subspace.device) if self.settings.common_random_numbers else None

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that moves the coordinates; None before `prepare`."""
        return self._optimizer

    @property
    def forward_passes(self) -> int:
        """Number of evaluations of the loss on a whole batch so far, on all ranks together."""
        return self.evaluator.forward_passes

    @property
    def forward_passes_per_step(self) -> int:
        """Number of evaluations of the loss on a whole batch in the next step, on all ranks together."""
        return forward_passes_of_a_step(self.estimator, type(self.rule), self.rule.options, self.step)

    @property
    def curvature_passes(self) -> int:
        """Number of evaluations in the current step that measure the curvature, beyond `forward_passes_per_step`."""
        return len(self._curvature_probes or ())

    @property
    def numbers(self) -> int:
        """Count of numbers in a step's record: the estimator's at every point, and one more for a rule's choice."""
        return self.estimator.numbers * self.rule.points * self.groups + bool(self.rule.candidates)

    @property
    def groups(self) -> int:
        """Number of groups of rows with directions of their own in a step; 1 before the end of the first step."""
        if self.private is not None:
            return self.private.groups
        return self.row_groups.count or 1 if self.row_groups is not None and self.row_groups.comes_apart else 1

    @property
    def awaits_optimizer(self) -> bool:
        """True after a step's estimate and before the optimizer's step, when the state is between two steps."""
        return self._applied is not None

    @property
    def at_start_of_step(self) -> bool:
        """True if no micro-batch of the step has been probed yet."""
        return self._sum.of_rank is None and not any(
            rows and rows.has_losses for rows in (self.row_groups, self.private)
        )

    def finish_estimate(self) -> Estimate:
        """Turn the losses that `probe` has gathered on all ranks into the gradient of this step."""
        if self.private is not None:
            return self._finish_private(self.private)
        probes, groups = self._probes(), self.row_groups
        here = len(self.estimator.probes())
        if groups is not None and groups.has_losses:
            by_group = groups.gather()
            losses = [sum(losses_at_probe) for losses_at_probe in zip(*by_group, strict=True)]
        else:
            assert self._sum.of_rank is not None, "finish_estimate needs a probe first"
            losses = self._sum.gather(probes)
            by_group = [losses]
        self._sum.discard()
        curvatures = self._found_curvatures(losses[:here])
        self._clean_loss = next((loss for loss, probe in zip(losses, probes, strict=True) if not probe.scale), None)
        self._begins_to_move = self._reads.settle(self.step)
        numbers = self.estimator.numbers_of_groups([group[:here] for group in by_group])
        if self.rule.points > 1:
            numbers += self.estimator.numbers_of_groups([group[-here:] for group in by_group])
        is_finite = bool(torch.tensor([*losses, *numbers]).isfinite().all())  # in float32, as the coordinates are
        self._apply_estimate(numbers, skipped=not is_finite)
        found = tuple(numbers[: self.estimator.num_directions * len(by_group)])
        if groups is not None and is_finite and groups.noise_scale.due(self.step):
            groups.noise_scale.see(found, self.estimator.num_directions)
        self._flat_loss.see(found, self.estimator.eps)
        return Estimate(self.estimator.loss(losses[:here]), found, is_finite, tuple(curvatures))

    def _finish_private(self, private: PrivateRows) -> Estimate:
        """Turn the step's sums, with their noise, into its gradient; no loss of it is known."""
        self._begins_to_move = self._reads.settle(self.step)
        numbers = private.release(self.step)
        self._apply_estimate(numbers, skipped=False)
        return Estimate(math.nan, tuple(numbers), True)

    def _apply_estimate(self, numbers: Sequence[float], skipped: bool) -> None:
        try:
            self._prepare_gradient(numbers, skipped)
        except BaseException:
            self.subspace.clear_gradient()
            raise
        finally:
            self._batches = []

    def _found_curvatures(self, losses: Sequence[float]) -> list[float]:
        """Return the curvatures that the step has measured, given the losses at its own probes."""
        if self.curvature is None or self._curvature_sum.of_rank is None:
            return []
        more = self._curvature_sum.gather(self.curvature.probes)
        dtype = self.evaluator.dtype_of_computation(self.subspace, self.evaluator.dtype)
        return self.curvature.record(losses, more, dtype)

    def apply(self, numbers: Sequence[float], skipped: bool) -> None:
        """Prepare the gradient of a recorded step, as training did.

        Args:
            numbers: the record: the estimator's numbers, with c neither clipped nor normalized, and the rule's choice.
            skipped: True prepares no gradient.
        """
        end = len(numbers) - bool(self.rule.candidates)
        self._prepare_gradient(numbers[:end], skipped, numbers[end:])

    def _prepare_gradient(self, numbers: Sequence[float], skipped: bool, chosen: Sequence[float] = ()) -> None:
        """Prepare the gradient of a step; a rule with candidates chooses one, unless it is `chosen`."""
        self._choose_kernels()
        self.distribution.begin()
        self.subspace.clip_factor = 1.0
        found = tuple(numbers)
        if skipped:
            missing = self.numbers - len(found) - len(chosen)
            self._applied = (*found, *chosen, *(math.nan,) * missing), True
            self.skipped_steps += 1
            self.subspace.clear_gradient()
            return
        self.distribution.observe(self._stream(0), found[: self.estimator.num_directions])
        slopes = len(found) // self.estimator.numbers * self.estimator.num_directions
        gradients = list(found[:slopes])
        if self.max_projected_grad:
            gradients = [max(-self.max_projected_grad, min(c, self.max_projected_grad)) for c in gradients]
        if self.normalization is not None:
            gradients = self.normalization(gradients)
            if self.settings.rows_per_direction:  # the length of the sum over groups is then that of one direction
                groups = slopes / (self.estimator.num_directions * self.rule.points)
                gradients = [c / math.sqrt(groups) for c in gradients]
        others = found[slopes:]
        self.rule.write_gradient([*gradients, *others], self._stream, self.distribution)
        self.subspace.hold_still()
        if self.rule.candidates:
            if not chosen:
                chosen = (self.rule.choose(self._losses_along_gradient(self.rule.candidates)),)
            self.rule.take(chosen[0])
        self._applied = (*found, *chosen), False

    def _losses_along_gradient(self, steps: Sequence[float]) -> list[float]:
        """Return the mean losses of all ranks at ξ - steps[i] · η · ĝ; the loss at ξ is evaluated only if unknown."""
        assert self.subspace.coordinate_blocks is not None
        assert self._optimizer is not None, "a rule with candidates needs prepare(optimizer) before the first step"
        rates = {id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]}
        by_name = {name: rates.get(id(p), 0.0) for name, p in self.subspace.coordinates.items()}
        self.subspace.coordinate_blocks.set_learning_rates(by_name)
        clean = self._clean_loss
        # Consecutive negative indices, because ranks that share a batch divide these probes among them as well.
        probes = [Probe(-1 - i, step) for i, step in enumerate(steps) if step or clean is None]
        after = self._generators()
        found = iter(self._losses.mean_at(self._batches, probes))
        if after is not None:
            after.restore()
        return [clean if clean is not None and not step else next(found) for step in steps]

    def discard(self) -> None:
        """Forget the micro-batches probed since the last step."""
        self._sum.discard()
        self._curvature_sum.discard()
        self._batches = []
        for rows in (self.row_groups, self.private):
            if rows is not None:
                rows.discard()

    def finish(self) -> nn.Module:
        """Fold the coordinates into the weights, and remove the engine from the model.

        Returns:
            The trained model: usually the model itself. If factors over a quantized model are never folded, it is a PEFT
            model around it, with the factors as a LoRA adapter.
        """
        self._choose_kernels()
        return self._folds.finish(self.step)

    def folded_state_dict(self) -> dict[str, Tensor] | None:
        """Return a state dict of the model as `finish` would leave it; None if the model already is in that state."""
        return self._folds.state_dict(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's state as plain numbers, without the coordinates and the optimizer's state."""
        normalization = self.normalization
        return {
            "step": self.step,
            "forward_passes": self.forward_passes,
            "skipped_steps": self.skipped_steps,
            "batched": self.evaluator.batched,
            "row_groups": None if self.row_groups is None else self.row_groups.state(),
            "pending_decay": dict(self._folds.decay),
            "normalization": None if normalization is None else [normalization.mean_square, normalization.steps],
            "distribution": self.distribution.state(),
            "curvature": None if self.curvature is None else self.curvature.state(),
            "still": sorted(self.subspace.still),
            "has_held": self._reads.has_held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state_dict` returned."""
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self.evaluator.forward_passes = state["forward_passes"]
        self.evaluator.batched = state["batched"]
        if self.row_groups is not None and state.get("row_groups") is not None:
            self.row_groups.load_state(state["row_groups"])
        self._folds.load(self.step, state["pending_decay"])
        self._reads.resume(self.step, state.get("still") or (), state.get("has_held", True))
        self.distribution.load_state(state.get("distribution", {}))
        if self.curvature is not None and state.get("curvature") is not None:
            self.curvature.load_state(state["curvature"])
        if self.normalization is not None and state["normalization"] is not None:
            self.normalization = ScalarNormalization(*state["normalization"])

    def _stream(self, direction: int) -> Stream:
        if self.row_groups is not None:
            direction = self.row_groups.noise_scale.shared(direction, self.estimator.num_directions, self.step)
        return Stream(self.seed, self.step, direction)

    def _advance(self) -> None:
        self._report_step()
        self.step += 1
        self.subspace.coordinates_changed()
        assert self._optimizer is not None
        if self._folds.advance(self.step, self._optimizer):
            self.rule.after_fold()

    def _report_step(self) -> None:
        gradients, skipped = self._applied or ((math.nan,) * self.numbers, True)
        self._applied = None
        if self.on_step is not None:
            assert self._optimizer is not None
            rates = tuple(float(group["lr"]) for group in self._optimizer.param_groups)
            begins = tuple(self._begins_to_move)
            self.on_step(Step(self.step, gradients, skipped, rates, self.subspace.clip_factor, begins))
        self._begins_to_move = []
