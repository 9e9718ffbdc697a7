"""The method of a run in one frozen record: subspace, directions, estimator, rule, and their options.

`ZOConfig`, the engine, checkpoints, the header of a log and its replay share this record. Each part of a method declares
its options, with default, help and range: `SubspaceOptions`, `EstimatorOptions`, `DirectionOptions`, `RuleOptions` and
`PrivacyOptions`.
`ZOConfig` has every option under the same name with `zo_` in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from zo_hf.directions import DISTRIBUTIONS, Distribution, Layers, unit_vectors
from zo_hf.directions.options import DirectionOptions
from zo_hf.estimators import ESTIMATORS, Estimator
from zo_hf.estimators.options import EstimatorOptions
from zo_hf.kernels import CHOICES as KERNELS
from zo_hf.method_info import Choice, Flag, Real, Whole, canonical_name, option, shown
from zo_hf.privacy import GaussianMechanism
from zo_hf.privacy.options import PrivacyOptions
from zo_hf.rules import RULES, Rule
from zo_hf.rules.options import RuleOptions
from zo_hf.subspaces import SUBSPACES, LowRank, Subspace, has_factors, subspace_kind
from zo_hf.subspaces.options import SubspaceOptions
from zo_hf.subspaces.peft_methods import is_peft
from zo_hf.untrusted.fields import brief, fits_type

#: Settings that may differ when a run is resumed or replayed. Batched probes give the same losses. Checkpoints and logs
#: name the parameters that move.
_NOT_SAVED = (
    "batched_probes",
    "cuda_graph",
    "common_random_numbers",
    "kernels",
    "target_modules",
    "exclude_modules",
)


@dataclass(frozen=True)
class Settings(SubspaceOptions, EstimatorOptions, DirectionOptions, RuleOptions, PrivacyOptions):
    """The options of a run's method; every value is checked, and names of methods are canonical.

    Raises:
        ValueError: a value is unknown or out of range; the message names the option.
    """

    max_projected_grad: float | None = option(
        None,
        "Maximum magnitude of a projected gradient c. A larger c is clipped to it; 0 never clips. Default: 0; 100 "
        "for scales.",
        Real(0, also=(None,)),
        "use 0 to clip nothing",
    )
    normalize: bool = option(
        False,
        "Divide c by its running root mean square. The learning rate is then the size of a step per coordinate, "
        "whatever the scale of the loss.",
        Flag(),
        "False does not divide",
    )
    batched_probes: bool | str = option(
        "auto",
        "Evaluate all probes of a step in one forward pass: True, False or auto. auto does so if both ways give the "
        "same losses in the first step. Batched probes are faster, and need memory for the activations of all "
        "probes; False needs the least memory. A batch for which such a forward pass fails is evaluated one probe at "
        "a time.",
        Choice(("auto",), also=(True, False)),
        "auto finds out which is right",
    )
    cuda_graph: bool = option(
        False,
        "Capture the forward pass that all probes share as a CUDA graph, one for every shape of a batch, and replay "
        "it in every step: one launch instead of hundreds. It needs zo_batched_probes=True, a CUDA device and the "
        "model's own loss. Not yet run on a GPU.",
        Flag(),
        "False is the default",
    )
    common_random_numbers: bool = option(
        True,
        "Give all probes of a step the same random numbers of torch, numpy and Python, for a loss that draws them. "
        "False lets each probe draw its own, and saves about 0.1 ms per probe, as measured on a CPU.",
        Flag(),
        "True is the default",
    )
    kernels: str = option(
        "auto",
        "The code that draws noise, folds, perturbs layers and norms, and updates zo_subspace full: auto, torch or "
        "triton. triton runs kernels that need one launch where torch needs many. It needs Triton and a CUDA device "
        "of compute capability 8.0 or newer. auto chooses triton if both are available, and torch otherwise. Not yet "
        "run on a GPU.",
        Choice(KERNELS),
        "'torch' needs no Triton",
    )
    seed: int = option(0, "The seed of every random number.", Whole(0), "0 is the default")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace not in ("auto", *SUBSPACES):
            raise ValueError(f"zo_subspace={self.subspace!r} is unknown; choose one of auto, {', '.join(SUBSPACES)}.")
        self._resolve("estimator", ESTIMATORS)
        self._resolve("direction", DISTRIBUTIONS)
        self._resolve("rule", RULES)

    def _resolve(self, name: str, entries: Mapping[str, Any]) -> None:
        object.__setattr__(self, name, canonical_name(f"zo_{name}", getattr(self, name), entries))

    @property
    def estimator_kind(self) -> type[Estimator]:
        """The class that `estimator` names."""
        return ESTIMATORS[self.estimator]

    @property
    def rule_kind(self) -> type[Rule]:
        """The class that `rule` names."""
        return RULES[self.rule]

    @property
    def moves_along_coordinates(self) -> bool:
        """True if directions are single coordinates; the coordinates are then held in memory, with a gradient."""
        return self.estimator_kind.along_coordinates

    @property
    def holds_gradient(self) -> bool:
        """False if the estimate is never held as a tensor: with all weights along random directions."""
        return self.subspace != "full" or self.moves_along_coordinates

    @property
    def is_private(self) -> bool:
        """True if the numbers of a step are clipped row by row, and get noise."""
        return self.dp_noise_multiplier is not None

    def make_mechanism(self) -> GaussianMechanism | None:
        """Make the mechanism of private training; None if training is not private."""
        if self.dp_noise_multiplier is None or self.dp_max_c is None:
            return None
        return GaussianMechanism(self.dp_noise_multiplier, self.dp_max_c)

    def make_estimator(self, eps: float) -> Estimator:
        """Make the estimator; its probes are at distance `eps` unless the settings have a distance."""
        return self.estimator_kind(eps if self.eps is None else self.eps, self.num_directions)

    def make_distribution(self, subspace: Subspace, own: Distribution | None = None) -> Distribution:
        """Make the distribution of a subspace's directions; `own` is the caller's, for directions that are not coordinates."""
        if self.moves_along_coordinates:
            return unit_vectors(subspace.coordinates, self.num_directions, self.coordinate_order, self.seed)
        if own is not None:
            return own
        return DISTRIBUTIONS[self.direction](subspace.direction_context(self.num_directions, self))

    def max_projected_grad_of(self, subspace: Subspace, estimator: Estimator) -> float:
        """Return the largest magnitude of c, 0 for none: the option, or the subspace's default for slopes."""
        if self.max_projected_grad is not None:
            return self.max_projected_grad
        return 0.0 if estimator.is_scale_free else subspace.default_max_projected_grad

    def subspace_of(self, model: nn.Module) -> str:
        """Return the name of the subspace; "auto" is resolved for this model."""
        if self.subspace == "auto":
            return "adapter" if is_peft(model) else "low_rank"
        return self.subspace

    def make_subspace(self, model: nn.Module, among: Iterable[Tensor] | None = None) -> Subspace:
        """Make the subspace of a model.

        Args:
            model: the model.
            among: only these parameters may move, such as those that an optimizer was built for; None allows all.

        Raises:
            ValueError: nothing is selected, a selected parameter cannot move this way, or its losses cannot resolve `eps`.
        """
        self._check_resolution(model)
        common: dict[str, Any] = {
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
            "among": among,
            "seed": self.seed,
        }
        kind = subspace_kind(self.subspace_of(model), self.moves_along_coordinates)
        if issubclass(kind, LowRank):
            common["preconditioner"] = self.preconditioner
        if has_factors(kind):
            common |= {"fold_steps": self.fold_steps, "basis": self.basis, "fold_rounding": self.fold_rounding}
            return kind(model, rank=self.rank, **common)
        return kind(model, **common)

    def _check_resolution(self, model: nn.Module) -> None:
        if self.eps is None or self.estimator_kind.needs_tangents:
            return
        dtypes = {parameter.dtype for parameter in model.parameters()}
        dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        if self.eps < torch.finfo(dtype).eps:
            raise ValueError(
                f"zo_eps={self.eps:g} is below {torch.finfo(dtype).eps:.1e}, the resolution of {str(dtype)[6:]}, so probes "
                "would give equal losses; use 'auto' for the subspace's default."
            )

    def to_saved(self) -> dict[str, Any]:
        """Return the settings that a resumed or replayed run must share, under the names of the options."""
        used = {"rule", "direction", *self.rule_kind.uses, *DISTRIBUTIONS[self.direction].uses}
        if self.moves_along_coordinates:
            used.add("coordinate_order")
        unused = {option.name for option in (*fields(RuleOptions), *fields(DirectionOptions))} - used
        return {
            _option_name(field.name): getattr(self, field.name)
            for field in fields(self)
            if field.name not in unused and field.name not in _NOT_SAVED
        }

    def resolved(
        self, subspace: Subspace, estimator: Estimator, distribution: Distribution, max_projected_grad: float
    ) -> dict[str, Any]:
        """Return `to_saved`, with the values that the parts made for a model have resolved."""
        low_rank = subspace if isinstance(subspace, LowRank) else None
        saved = self.to_saved() | {
            "zo_subspace": subspace.name,
            "zo_rank": low_rank.rank if low_rank else None,
            "zo_fold_steps": low_rank.fold_steps if low_rank else None,
            "zo_eps": estimator.eps,
            "zo_direction": self.direction if estimator.along_coordinates else distribution.name,
            "zo_max_projected_grad": max_projected_grad,
            "coordinates": subspace.dimension,
        }
        if isinstance(distribution, Layers):
            saved["zo_active_layers"] = distribution.active
        return saved

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], **more: Any) -> Settings:
        """Make settings from `to_saved` of this version or an older one; a missing setting has its default.

        Args:
            saved: the saved settings; other entries, and settings that are None, are ignored.
            more: fields that take precedence.

        Raises:
            ValueError: a method is unknown to this version, or a value has another type than its setting.
        """
        known = {field.name: saved.get(_option_name(field.name)) for field in fields(cls) if field.name not in more}
        kinds = get_type_hints(cls)
        for name, value in known.items():
            if value is not None and not fits_type(value, kinds[name]):
                raise ValueError(
                    f"{_option_name(name)}={brief(value)} has another type than this setting; correct it."
                )
        return cls(**{name: value for name, value in known.items() if value is not None} | more)


def method_of(
    settings: Settings | Subspace | str | None,
    subspace: Subspace | str | None,
    direction: Distribution | str | None,
    options: dict[str, Any],
) -> tuple[Settings, Subspace | None, Distribution | None]:
    """Return an engine's settings, and the parts that its caller has already made.

    Raises:
        ValueError: an option is given twice, or a part is neither a name nor such a part.
    """
    if not isinstance(settings, Settings | None):
        settings, subspace = None, settings
    _check_part("subspace", subspace, Subspace)
    _check_part("direction", direction, Distribution)
    named = {"subspace": subspace, "direction": direction}
    options = options | {name: value for name, value in named.items() if isinstance(value, str)}
    if settings is not None and options:
        option = next(iter(options))
        raise ValueError(f"{option}={options[option]!r} is given beside settings=...; set {option} in the Settings.")
    made_subspace = None if isinstance(subspace, str) else subspace
    made_direction = None if isinstance(direction, str) else direction
    return Settings(**options) if settings is None else settings, made_subspace, made_direction


def _check_part(name: str, part: object, kind: type) -> None:
    if not isinstance(part, kind | str | None):
        raise ValueError(
            f"zo_{name}={shown(part)} must be a name, or a {kind.__name__} made for this model; `zo-hf methods` lists the "
            "names."
        )


def _option_name(name: str) -> str:
    return name if name == "seed" else f"zo_{name}"


#: Every setting's default, under its name in checkpoints and logs.
SAVED_DEFAULTS = {_option_name(field.name): field.default for field in fields(Settings)}
