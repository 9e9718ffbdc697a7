"""The optimizer of the coordinates: a new one, or the user's own with the coordinates as its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor
from transformers.trainer_optimizer import is_optimizer_factory

from zo_hf.engine import ZerothOrder
from zo_hf.rules import SeededSGD
from zo_hf.stability.descent import ADAM
from zo_hf.subspaces import Full, Subspace

#: An optimizer class and its arguments.
ClassAndArguments = tuple[Any, dict[str, Any]]
#: Arguments that hold the parameter groups instead of the optimizer's own, as Trainer takes them; the last one counts.
_GROUPS = ("params", "model", "optimizer_dict")


def new_optimizer(
    zo: ZerothOrder,
    weight_decay: float,
    learning_rate: float,
    class_and_arguments: Callable[[], ClassAndArguments],
    decayed: Collection[str] | None = None,
) -> Optimizer:
    """Make an optimizer over an engine's coordinates.

    Args:
        zo: the engine.
        weight_decay: weight decay of the groups that decay.
        learning_rate: learning rate of the seeded SGD that moves all weights.
        class_and_arguments: returns the optimizer class that the user chose, and its arguments. If all weights move, only
            parameter groups among these count.
        decayed: names of the parameters that decay, if a subclass chooses them; None takes matrices outside of norms.

    Raises:
        ValueError: the class is a factory that builds from a model, or does not take its arguments.
    """
    kind, arguments = class_and_arguments()
    given, arguments = parameter_groups(arguments), without_groups(arguments)
    if given is not None:
        groups = _of_coordinates(given, zo.subspace)
    else:
        groups = zo.coordinates(weight_decay) if decayed is None else _groups(zo.subspace, weight_decay, decayed)
    if isinstance(zo.subspace, Full):
        return SeededSGD(groups, zo.subspace, lr=learning_rate)
    if is_optimizer_factory(kind):
        raise ValueError(f"optimizer_cls_and_kwargs={kind!r} builds from a model; pass an Optimizer class instead.")
    if kind is Adafactor:
        # By default Adafactor moves each tensor relative to its size, but coordinates begin at zero.
        arguments = {**arguments, "scale_parameter": False, "relative_step": False}
    try:
        optimizer: Optimizer = kind(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optim_args=... or optimizer_cls_and_kwargs=... does not fit {getattr(kind, '__name__', kind)} ({error}); correct "
            "the arguments of the optimizer."
        ) from error
    return optimizer


def _groups(subspace: Subspace, weight_decay: float, decayed: Collection[str]) -> list[dict[str, Any]]:
    """Return parameter groups of the coordinates: those of the named parameters with weight decay, the others without."""
    names = decayed if subspace.are_weights else ()
    with_decay = [p for name, p in subspace.coordinates.items() if name in names]
    without = [p for name, p in subspace.coordinates.items() if name not in names]
    both = ((with_decay, weight_decay), (without, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in both if parameters]


def parameter_groups(arguments: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the parameter groups among an optimizer's arguments, as Trainer finds them; None without any."""
    name = next((name for name in reversed(_GROUPS) if name in arguments), None)
    if name is None:
        return None
    given = arguments[name]
    given = list(given.parameters() if isinstance(given, nn.Module) else given)
    if not all(isinstance(group, dict) for group in given):
        given = [{"params": given}]
    return [{**group, "params": _parameters(group["params"])} for group in given]


def without_groups(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's arguments without its parameter groups."""
    return {name: value for name, value in arguments.items() if name not in _GROUPS}


def _parameters(given: Any) -> list[Tensor]:
    """Return the parameters of a group, which torch takes alone, in an iterable, or each after its name."""
    return [given] if isinstance(given, Tensor) else [one[1] if isinstance(one, tuple) else one for one in given]


def _of_coordinates(groups: list[dict[str, Any]], subspace: Subspace) -> list[dict[str, Any]]:
    """Return parameter groups with coordinates instead of parameters, without groups in which nothing moves."""
    moved = [{**group, "params": _coordinates_of(group["params"], subspace)} for group in groups]
    if not subspace.are_weights:
        moved = [{**group, "weight_decay": 0.0} for group in moved]
    return [group for group in moved if group["params"]]


def is_schedule_free(kind: Any) -> bool:
    """Return whether an optimizer or its class swaps its parameters between training and evaluation.

    Trainer recognizes such an optimizer by its methods `train` and `eval`, too.
    """
    if isinstance(kind, AcceleratedOptimizer):
        kind = kind.optimizer
    return all(callable(getattr(kind, name, None)) for name in ("train", "eval"))


def rest_on_weights(optimizer: Optimizer, subspace: Subspace) -> None:
    """Let the optimizer of a training that has ended refer to weights instead of coordinates, without any state.

    Its groups keep their learning rates, so that Trainer's `get_learning_rates` and `get_optimizer_group` work.
    """
    weight_of = {
        id(subspace.coordinates[site.name]): site.parameter
        for site in subspace.sites
        if site.name in subspace.coordinates
    }
    optimizer.state.clear()
    # The engine's hook would keep its coordinates in memory.
    optimizer._optimizer_step_post_hooks.clear()  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["params"] = [weight_of.get(id(parameter), parameter) for parameter in group["params"]]


def divides(optimizer: Optimizer | None, class_and_arguments: ClassAndArguments | None) -> bool | None:
    """Return whether the user's own optimizer is Adam or AdamW, which divide by a running mean; None without one."""
    if optimizer is not None:
        return type(optimizer) in ADAM
    return None if class_and_arguments is None else class_and_arguments[0] in ADAM


def retarget(optimizer: Optimizer, subspace: Subspace) -> list[list[nn.Parameter]]:
    """Replace an optimizer's parameters by their coordinates.

    Returns:
        The parameters of every group as they were, for `give_back`.
    """
    before = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = _coordinates_of(group["params"], subspace)
    return before


def _coordinates_of(parameters: Iterable[Tensor], subspace: Subspace) -> list[nn.Parameter]:
    coordinate_of = {id(site.parameter): subspace.coordinates[site.name] for site in subspace.sites}
    return [coordinate_of[id(p)] for p in parameters if id(p) in coordinate_of]


def give_back(optimizer: Optimizer, groups: list[list[nn.Parameter]]) -> None:
    """Clear a user's optimizer, and give it its parameters back.

    Args:
        optimizer: the optimizer.
        groups: the parameters of every group, from `retarget`.
    """
    optimizer.state.clear()
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
