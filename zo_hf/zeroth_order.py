"""The engine: a step of zeroth-order optimization on any `nn.Module`, with any closure and any optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_hf.directions import DISTRIBUTIONS, Distribution, Run, Stream, unit_vectors
from zo_hf.distributed import Ranks
from zo_hf.estimators import ESTIMATORS, Estimator
from zo_hf.optimizers import RULES, Rule, RuleOptions, ScalarNormalisation
from zo_hf.probes.curvature import CurvatureProbes
from zo_hf.probes.evaluate import ProbeEvaluator
from zo_hf.probes.probe import Probe
from zo_hf.subspaces import SUBSPACES, Folded, Subspace, subspace_kind
from zo_hf.subspaces.sites import is_decayed
from zo_hf.subspaces.subspace import StreamOf
from zo_hf.together import check_coordinates, check_direction, check_together

logger = logging.getLogger(__name__)

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Estimate:
    """What one step found.

    Args:
        loss: at the current point where the estimator evaluates it, else the mean over the probes.
        projected_gradients: c of every direction.
        is_finite: False if a loss or a c is not finite; the optimizer is then given nothing to apply.
        curvatures: zᵀHz of the directions that were measured, see `CurvatureProbes`; none in most steps.
    """

    loss: float
    projected_gradients: tuple[float, ...]
    is_finite: bool
    curvatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """What one optimizer step was made of: with the seed, everything that a replay needs.

    Args:
        step: its number, from 0.
        projected_gradients: c of every direction, before any normalisation, then what else the estimator found, and what
            the rule chose; see `ZerothOrder.numbers`.
        skipped: whether the optimizer was given nothing to apply.
        learning_rates: of every parameter group.
        clip_factor: what the estimate was multiplied by before the optimizer saw it.
    """

    step: int
    projected_gradients: tuple[float, ...]
    skipped: bool
    learning_rates: tuple[float, ...]
    clip_factor: float


class ZerothOrder:
    """Estimates gradients of a model's loss from forward passes and hands them to an optimizer.

        zo = ZerothOrder(model, seed=0)
        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-4))
        for batch in data:
            estimate = zo.estimate(lambda: loss_function(model(batch)))
            optimizer.step()
        model = zo.finish()

    Args:
        model: any module; it stays in the mode (train or eval) it is in.
        subspace: which tensors move, by name or as an object made for this model.
        eps: distance ε of a probe; None takes the subspace's own (1e-3 for weights, 1e-2 for an adapter).
        num_directions: q, directions per step.
        estimator: how losses become projected gradients, see `zo_hf.estimators`.
        direction: the distribution directions are drawn from, by name (see `zo_hf.directions`) or made for this subspace.
        active_layers: fraction of the layers that move in a step, for the directions that choose layers; None takes its own.
        coordinate_order: where directions are single coordinates, "cyclic" or "permuted", see `UnitVectors`.
        rule: what turns projected gradients into the gradient that the torch optimizer gets, see `zo_hf.optimizers`.
        rule_options: what can be set about it.
        max_projected_grad: clip c to at most this magnitude; 0 does not, None takes the subspace's own.
        normalize: divide c by its running root mean square (see `ScalarNormalisation`).
        batched: evaluate all probes in one batch: True, False or "auto" (see `ProbeEvaluator`).
        seed: what every random number depends on.
        ranks: the processes that train together, made with `zo_hf.distributed.make_grid`; the weights must be equal on
            all of them (`Ranks.take_from_first`). Default: this process alone.
        replays: no forward pass is to come, so the model need not be fit for the estimator's.

    Attributes:
        on_step: called after every optimizer step with what it was made of; None calls nothing.
        curvature: what some steps measure beside their probes, and what they have found; None measures nothing.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """

    on_step: Callable[[Step], None] | None = None
    curvature: CurvatureProbes | None = None

    def __init__(
        self,
        model: nn.Module,
        subspace: str | Subspace = "low_rank",
        eps: float | None = None,
        num_directions: int = 1,
        estimator: str = "two_point",
        direction: str | Distribution = "gaussian",
        active_layers: float | None = None,
        coordinate_order: str = "cyclic",
        rule: str = "none",
        rule_options: RuleOptions | None = None,
        max_projected_grad: float | None = None,
        normalize: bool = False,
        batched: bool | str = "auto",
        seed: int = 0,
        ranks: Ranks | None = None,
        replays: bool = False,
    ) -> None:
        kind = _known("estimator", estimator, ESTIMATORS)
        if not replays:
            kind.check_model(model)
        if kind.needs_tangents and batched is True:
            raise ValueError(f"batched=True cannot evaluate estimator={estimator!r}; use False or 'auto'.")
        if isinstance(subspace, str):
            _known("subspace", subspace, SUBSPACES)
            subspace = subspace_kind(subspace, kind.along_coordinates)(model, seed=seed)
        self.model, self.subspace, self.seed = model, subspace, seed
        eps = subspace.default_eps if eps is None else eps
        self.estimator = kind(eps, num_directions)
        self.direction = direction if isinstance(direction, str) else direction.name
        self.coordinate_order = coordinate_order
        check_coordinates(estimator, subspace)
        check_direction(estimator, self.direction)
        if kind.along_coordinates:
            self.distribution: Distribution = unit_vectors(
                subspace.coordinates, num_directions, coordinate_order, seed
            )
        elif isinstance(direction, str):
            run = Run(subspace, num_directions, active_layers)
            self.distribution = _known("direction", direction, DISTRIBUTIONS)(run)
        else:
            self.distribution = direction
        self.rule = _known("rule", rule, RULES)(subspace, self.estimator, rule_options)
        check_together(self.estimator, self.distribution, self.rule, subspace)
        if max_projected_grad is None:
            max_projected_grad = 0.0 if self.estimator.is_scale_free else subspace.default_max_projected_grad
        self.max_projected_grad = max_projected_grad
        self.normalisation = ScalarNormalisation() if normalize else None
        self.evaluator = ProbeEvaluator(False if kind.needs_tangents else batched)
        self.ranks = ranks if ranks is not None else Ranks()
        self.evaluator.agree = self.ranks.agree
        self.step = 0
        self.skipped_steps = 0
        self._optimizer: Optimizer | None = None
        self._losses: Tensor | None = None
        self._curvature_losses: Tensor | None = None
        self._batches: list[tuple[Callable[[], Tensor], float]] = []
        self._clean_loss: float | None = None
        self._applied: tuple[tuple[float, ...], bool] | None = None
        self._pending_decay: dict[str, float] = {}
        self._looked_for_unreached = False
        subspace.attach()

    def coordinates(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: what weight decay applies to, and what it does not (norms and biases)."""
        decayed = {site.name for site in self.subspace.sites if self.subspace.are_weights and is_decayed(site)}
        groups = []
        for names, decay in ((decayed, weight_decay), (self.subspace.coordinates.keys() - decayed, 0.0)):
            params = [p for name, p in self.subspace.coordinates.items() if name in names]
            if params:
                groups.append({"params": params, "weight_decay": decay})
        return groups

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Tell the engine which optimizer moves its coordinates; each of its steps ends a step of the engine.

        Raises:
            ValueError: the rule does not work with this optimizer; the message says which to use instead.
        """
        self.rule.check_optimizer(optimizer)
        self._optimizer = optimizer
        optimizer.register_step_post_hook(lambda *_: self._advance())
        return optimizer

    def estimate(self, closure: Callable[[], Tensor]) -> Estimate:
        """Probe the loss around the current point and leave the estimated gradient for `optimizer.step()`.

        Args:
            closure: evaluates the model and returns a scalar loss; called once per probe, on the same batch.
        """
        self.probe(closure)
        return self.finish_estimate()

    def probe(self, closure: Callable[[], Tensor], weight: float = 1.0) -> Tensor:
        """Add one micro-batch to the step: its losses at this rank's probes, times `weight`, (number of them,)."""
        self.distribution.begin()
        losses = self._own_losses(closure, self._probes()) * weight
        self._losses = losses if self._losses is None else self._losses + losses
        if self.curvature is not None and self.curvature.due(self.step):
            with self.curvature.along(self.subspace):
                more = self._own_losses(closure, self.curvature.probes) * weight
            self._curvature_losses = more if self._curvature_losses is None else self._curvature_losses + more
        if self.rule.candidates:
            self._batches.append((closure, weight))
        return losses

    def losses_at(
        self,
        batches: Sequence[tuple[Callable[[], Tensor], float]],
        probes: Sequence[Probe],
        stream_of: StreamOf | None = None,
        distribution: Distribution | None = None,
    ) -> list[float]:
        """Losses on all ranks at points that are no part of a step: nothing that the run depends on changes but the count.

        Args:
            batches: closures of a step's micro-batches, as for `estimate`, and the weight of each.
            probes: the points, evaluated one after another.
            stream_of: the stream of each direction index; None takes the step's.
            distribution: what directions are drawn from; None takes the step's.
        """
        self.distribution.begin()
        # What "auto" chooses about batched probes is left to the first step.
        batched, self.evaluator.batched = self.evaluator.batched, False
        try:
            own = [self._own_losses(closure, probes, stream_of, distribution) * weight for closure, weight in batches]
        finally:
            self.evaluator.batched = batched
        return self.ranks.mean_losses(torch.stack(own).sum(0), probes).tolist()

    def _probes(self) -> list[Probe]:
        return probes_of_a_step(self.estimator, type(self.rule), self.rule.options, self.step)

    def _own_losses(
        self,
        closure: Callable[[], Tensor],
        probes: Sequence[Probe],
        stream_of: StreamOf | None = None,
        distribution: Distribution | None = None,
    ) -> Tensor:
        """The losses at those of the probes that are this rank's; the passes that all ranks make are counted."""
        own = [probes[i] for i in self.ranks.grid.own(probes)]
        if not own:
            self.evaluator.forward_passes += len(probes)
            device = next(iter(self.subspace.coordinates.values())).device
            return torch.zeros(0, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        stream_of, distribution = stream_of or self._stream, distribution or self.distribution
        return self.evaluator.losses(self.subspace, closure, own, stream_of, distribution, count=len(probes))

    @property
    def optimizer(self) -> Optimizer | None:
        """What moves the coordinates; None before `prepare`."""
        return self._optimizer

    @property
    def forward_passes(self) -> int:
        """Evaluations of the loss on a whole batch so far, whichever ranks made them."""
        return self.evaluator.forward_passes

    @property
    def forward_passes_per_step(self) -> int:
        """Evaluations of the loss on a whole batch that the next step takes, whichever ranks make them."""
        return forward_passes_of_a_step(self.estimator, type(self.rule), self.rule.options, self.step)

    @property
    def curvature_passes(self) -> int:
        """Evaluations of the loss on a whole batch that the present step takes beyond `forward_passes_per_step`."""
        return len(self.curvature.probes) if self.curvature is not None and self.curvature.due(self.step) else 0

    @property
    def numbers(self) -> int:
        """How many numbers a step is recorded as: the estimator's at every point, and one more if the rule makes a choice."""
        return self.estimator.numbers * self.rule.points + bool(self.rule.candidates)

    @property
    def at_start_of_step(self) -> bool:
        """Whether no micro-batch of the step has been probed yet."""
        return self._losses is None

    def finish_estimate(self) -> Estimate:
        """Turn the losses gathered by `probe`, on all ranks, into the gradient of this step."""
        assert self._losses is not None, "finish_estimate needs a probe first"
        probes = self._probes()
        losses = self.ranks.mean_losses(self._losses, probes).tolist()
        self._losses = None
        here = len(self.estimator.probes())
        curvatures = self._found_curvatures(losses[:here])
        self._clean_loss = next((loss for loss, probe in zip(losses, probes, strict=True) if not probe.scale), None)
        self._name_what_was_not_reached()
        numbers = self.estimator.projected_gradients(losses[:here])
        if self.rule.points > 1:
            numbers += self.estimator.projected_gradients(losses[-here:])
        is_finite = _all_finite([*losses, *numbers])
        try:
            self.apply(numbers, skipped=not is_finite)
        except BaseException:
            self.subspace.clear_gradient()
            raise
        finally:
            self._batches = []
        found = tuple(numbers[: self.estimator.num_directions])
        return Estimate(self.estimator.loss(losses[:here]), found, is_finite, tuple(curvatures))

    def _found_curvatures(self, losses: Sequence[float]) -> list[float]:
        """What the step has measured beside its probes; losses: at these at the current point, of all ranks."""
        if self.curvature is None or self._curvature_losses is None:
            return []
        probes = self.curvature.probes
        more = self.ranks.mean_losses(self._curvature_losses, probes).tolist() if probes else []
        self._curvature_losses = None
        return self.curvature.record(losses, more, self.evaluator.dtype)

    def apply(self, numbers: Sequence[float], skipped: bool) -> None:
        """Leave the gradient that a step's numbers stand for to `optimizer.step()`: training and replay end here.

        Args:
            numbers: of the estimator, its c neither clipped nor normalised; and in a replay what the rule chose.
            skipped: leave the optimizer nothing instead.
        """
        self.distribution.begin()
        self.subspace.clip_factor = 1.0
        count = self.estimator.numbers * self.rule.points
        found, chosen = tuple(numbers[:count]), tuple(numbers[count:])
        if skipped:
            missing = self.numbers - len(numbers)
            self._applied = (*found, *chosen, *(math.nan,) * missing), True
            self.skipped_steps += 1
            self.subspace.clear_gradient()
            return
        self.distribution.observe(self._stream(0), found[: self.estimator.num_directions])
        slopes = self.estimator.num_directions * self.rule.points
        gradients = list(found[:slopes])
        if self.max_projected_grad:
            gradients = [max(-self.max_projected_grad, min(c, self.max_projected_grad)) for c in gradients]
        if self.normalisation is not None:
            gradients = self.normalisation(gradients)
        others = found[slopes:]
        self.rule.write_gradient([*gradients, *others], self._stream, self.distribution)
        if self.rule.candidates:
            if not chosen:
                chosen = (self.rule.choose(self._losses_along_gradient(self.rule.candidates)),)
            self.rule.take(chosen[0])
        self._applied = (*found, *chosen), False

    def _losses_along_gradient(self, steps: Sequence[float]) -> list[float]:
        """Losses of the step's batches, on all ranks, at ξ - steps[i] · η · ĝ; the clean one only if it is not known."""
        assert self.subspace.materialised is not None
        assert self._optimizer is not None, "a rule with candidates needs prepare(optimizer) before the first step"
        rates = {id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]}
        by_name = {name: rates.get(id(p), 0.0) for name, p in self.subspace.coordinates.items()}
        self.subspace.materialised.set_learning_rates(by_name)
        clean = self._clean_loss
        # One after another of the negative indices: ranks that share a batch share these probes out, too.
        probes = [Probe(-1 - i, step) for i, step in enumerate(steps) if step or clean is None]
        own = [self._own_losses(closure, probes) * weight for closure, weight in self._batches]
        found = iter(self.ranks.mean_losses(torch.stack(own).sum(0), probes).tolist())
        return [clean if clean is not None and not step else next(found) for step in steps]

    def discard(self) -> None:
        """Forget the micro-batches probed since the last step."""
        self._losses, self._curvature_losses, self._batches = None, None, []

    def finish(self) -> nn.Module:
        """Fold the coordinates into the weights and take every trace of the engine out of the model.

        Returns:
            The model that was learnt: the model itself, or, where factors over a quantised model are never folded, the
            model inside a PEFT model that has them as a LoRA adapter.
        """
        subspace, decay = self.subspace, self._pending_decay
        self._pending_decay = {}
        if self.step == 0 and isinstance(subspace, Folded) and subspace.at_origin:
            subspace.clear_gradient()  # nothing is written: adding zeros would turn a weight of -0.0 into 0.0
            subspace.detach()
            return self.model
        return subspace.finish(self.step, decay)

    def folded_state_dict(self) -> dict[str, Tensor] | None:
        """A state dict of the model as `finish` would leave it now, or None where the model is that already."""
        return self.subspace.folded_state_dict(self.step, self._pending_decay)

    def state_dict(self) -> dict[str, Any]:
        """What, beside the coordinates and the optimizer, the rest of the run depends on: plain numbers."""
        normalisation = self.normalisation
        return {
            "step": self.step,
            "forward_passes": self.forward_passes,
            "skipped_steps": self.skipped_steps,
            "batched": self.evaluator.batched,
            "pending_decay": dict(self._pending_decay),
            "normalisation": None if normalisation is None else [normalisation.mean_square, normalisation.steps],
            "distribution": self.distribution.state(),
            "curvature": None if self.curvature is None else self.curvature.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self.evaluator.forward_passes = state["forward_passes"]
        self.evaluator.batched = state["batched"]
        self._pending_decay = dict(state["pending_decay"])
        self.distribution.load_state(state.get("distribution", {}))
        if self.curvature is not None and state.get("curvature") is not None:
            self.curvature.load_state(state["curvature"])
        if self.normalisation is not None and state["normalisation"] is not None:
            self.normalisation = ScalarNormalisation(*state["normalisation"])

    def _name_what_was_not_reached(self) -> None:
        """Once, after the first step: parameters that no forward pass used would be moved by noise alone."""
        if self._looked_for_unreached:
            return
        self._looked_for_unreached = True
        names = self.subspace.unvisited()
        if names:
            logger.warning(
                "%d parameters were not used through their module's forward in the first step (%s%s); if they never are, "
                "leave them out with zo_exclude_modules: an update of them is noise.",
                len(names),
                ", ".join(names[:3]),
                ", ..." if len(names) > 3 else "",
            )

    def _stream(self, direction: int) -> Stream:
        return Stream(self.seed, self.step, direction)

    def _advance(self) -> None:
        self._report_step()
        self.step += 1
        self.subspace.coordinates_changed()
        if isinstance(self.subspace, Folded):
            self._remember_decay(self.subspace)
            if self.subspace.fold_steps and self.step % self.subspace.fold_steps == 0:
                self.subspace.fold(self.step, self._pending_decay)
                self._pending_decay = {}
                self.rule.after_fold()

    def _report_step(self) -> None:
        nothing = ((math.nan,) * self.numbers, True)
        gradients, skipped = self._applied or nothing
        self._applied = None
        if self.on_step is not None:
            assert self._optimizer is not None
            rates = tuple(float(group["lr"]) for group in self._optimizer.param_groups)
            self.on_step(Step(self.step, gradients, skipped, rates, self.subspace.clip_factor))

    def _remember_decay(self, subspace: Folded) -> None:
        """The optimizer decays B; the weights under it are owed the same factor, which the next fold applies."""
        assert self._optimizer is not None
        names = {id(p): name for name, p in subspace.coordinates.items()}
        for group in self._optimizer.param_groups:
            factor = 1.0 - float(group["lr"]) * group.get("weight_decay", 0.0)
            if factor != 1.0:
                for parameter in group["params"]:
                    if parameter.grad is None:  # a skipped step: the optimizer did not decay B either
                        continue
                    name = names[id(parameter)]
                    self._pending_decay[name] = self._pending_decay.get(name, 1.0) * factor


def probes_of_a_step(estimator: Estimator, rule: type[Rule], options: RuleOptions, step: int) -> list[Probe]:
    """The estimator's probes, and the same once more around the snapshot of a rule that looks back in this step."""
    probes = estimator.probes()
    if rule.looks_back(step, options):
        probes += [replace(probe, at_snapshot=True) for probe in probes]
    return probes


def forward_passes_of_a_step(estimator: Estimator, rule: type[Rule], options: RuleOptions, step: int) -> int:
    """Evaluations of the loss on a whole batch: the probes, and the candidates that none of them has evaluated."""
    probes = probes_of_a_step(estimator, rule, options, step)
    has_clean = any(probe.scale == 0.0 for probe in probes)
    return len(probes) + sum(not has_clean or candidate != 0.0 for candidate in rule.candidates)


def _known(argument: str, name: str, registry: Mapping[str, _Entry]) -> _Entry:
    if name not in registry:
        raise ValueError(f"{argument}={name!r} is unknown; choose one of {', '.join(registry)}.")
    return registry[name]


def _all_finite(values: list[float]) -> bool:
    return bool(torch.tensor(values).isfinite().all())
