"""A Trainer's optimizers: the one that the arguments name, the user's own, and the one of a training that has ended."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from zo_hf import kernels
from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.offload import computing_devices
from zo_hf.trainer.optimizer import (
    ClassAndArguments,
    is_schedule_free,
    parameter_groups,
    rest_on_weights,
    without_groups,
)
from zo_hf.trainer.overrides import overrides
from zo_hf.trainer.private import PrivateTrainer

_HOOK = "get_optimizer_cls_and_kwargs"


class OptimizerHooks(PrivateTrainer):
    """Resolves the optimizer of a training, and leaves one behind when its coordinates are gone."""

    zo: ZerothOrder | None = None
    optimizer: Any
    optimizer_cls_and_kwargs: ClassAndArguments | None
    _own_optimizer: torch.optim.Optimizer | None = None

    @property
    def _facts(self) -> frozenset[str]:
        """The facts that hold for this run, see `zo_hf.compatibility.Case`."""
        facts = {
            "optimizers": self.optimizer is not None,
            "optimizer_cls_and_kwargs": self.optimizer_cls_and_kwargs is not None,
            "kernels": kernels.would_run_on(computing_devices(self.model)[0], self.args.zo_kernels),
            "schedule-free": is_schedule_free(self.optimizer or (self.optimizer_cls_and_kwargs or (None,))[0]),
        }
        held = frozenset(name for name, holds in facts.items() if holds)
        return held if self._division is None else held | self._division.facts

    def _optimizer_class(self, rate: float) -> ClassAndArguments:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        resolved = copy.copy(self.args)
        resolved.learning_rate = rate
        kind, arguments = self.get_optimizer_cls_and_kwargs(resolved, self.model)
        facts = {
            "schedule-free": is_schedule_free(kind),
            "another class": overrides(self, _HOOK) and kind is not torch.optim.SGD,
            "own rates": any("lr" in group for group in parameter_groups(arguments) or ()),
        }
        held = frozenset(name for name, holds in facts.items() if holds)
        check(Case(self.args.settings(), vars(self.args), self._facts | held))
        return kind, arguments

    def _chosen_parameters(self) -> list[Tensor] | None:
        """Return the parameters that alone may move, because the user's optimizer or groups hold them; None allows all.

        Raises:
            ValueError: one is trainable, and not a parameter of the model.
        """
        if self.optimizer is not None:
            is_made = self._is_overridden("create_optimizer")
            source = f"{type(self).__name__}.create_optimizer" if is_made else "optimizers=..."
            groups = self.optimizer.param_groups
        elif self.optimizer_cls_and_kwargs is not None:
            kind, arguments = self.optimizer_cls_and_kwargs
            source, groups = "optimizer_cls_and_kwargs=...", parameter_groups(arguments)
            if groups is not None:  # an iterator such as model.parameters() yields its parameters once
                self.optimizer_cls_and_kwargs = kind, {**without_groups(arguments), "params": groups}
        elif overrides(self, _HOOK):
            given = self.args.learning_rate
            # Without a number the rate depends on the engine, which is made for these parameters.
            rate = float(given) if isinstance(given, int | float) else 1.0
            source, groups = f"{type(self).__name__}.{_HOOK}", parameter_groups(self._optimizer_class(rate)[1])
        else:
            return None
        if groups is None:
            return None
        chosen = [parameter for group in groups for parameter in group["params"]]
        self._refuse_others(source, chosen)
        return chosen

    def _check_groups(self) -> None:
        """Refuse groups that a subclass's `create_optimizer` has changed after its call of super().

        Raises:
            ValueError: a parameter is not among the coordinates.
        """
        assert self.zo is not None
        coordinates = {id(parameter) for parameter in self.zo.subspace.coordinates.values()}
        held = [p for group in self._torch_optimizer().param_groups for p in group["params"]]
        others = [parameter for parameter in held if id(parameter) not in coordinates]
        if not others:
            return
        source = f"{type(self).__name__}.create_optimizer"
        self._refuse_others(source, others)
        raise ValueError(
            f"{source} adds a parameter to the optimizer of super().create_optimizer(), which holds coordinates instead of "
            "parameters; make the whole optimizer from self.model.named_parameters(), without super()."
        )

    def _refuse_others(self, source: str, parameters: Iterable[Tensor]) -> None:
        of_model = {id(parameter) for parameter in self.model.parameters()}
        other = next((p for p in parameters if p.requires_grad and id(p) not in of_model), None)
        if other is not None:
            raise ValueError(
                f"{source} trains {_name_of(other, vars(self))}, which is not a parameter of the model, so it would never "
                "move; make it a part of the model, or freeze it by requires_grad_(False)."
            )

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def _keep_optimizer(self, zo: ZerothOrder) -> None:
        if self.optimizer is None:  # the engine exists, but making the optimizer has failed
            return
        self.optimizer = self._own_optimizer = self._torch_optimizer()
        rest_on_weights(self._own_optimizer, zo.subspace)

    def _forget_own_optimizer(self) -> None:
        """Forget the optimizer of an earlier training, so that the next one makes its own."""
        if self.optimizer is not None and self.optimizer is self._own_optimizer:
            self.optimizer = None
        self._own_optimizer = None


def _name_of(parameter: Tensor, attributes: Mapping[str, Any]) -> str:
    """Return the name by which a Trainer's attributes hold a parameter, or its shape."""
    for name, value in attributes.items():
        modules = value.items() if isinstance(value, dict) else [(None, value)]
        for key, module in modules:
            if isinstance(module, nn.Module):
                inside = (inner for inner, one in module.named_parameters() if one is parameter)
                found = next(inside, None)
                if found is not None:
                    return ".".join(map(str, (part for part in (name, key, found) if part is not None)))
            elif module is parameter:
                return name
    return f"a tensor of shape {tuple(parameter.shape)}"
