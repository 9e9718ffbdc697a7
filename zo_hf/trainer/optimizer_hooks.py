"""A Trainer's optimizers: the one that the arguments name, the user's own, and the one of a training that has ended."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from zo_hf import kernels
from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.offload import computing_devices
from zo_hf.trainer.optimizer import ClassAndArguments, is_schedule_free, rest_on_weights
from zo_hf.trainer.private import PrivateTrainer


class OptimizerHooks(PrivateTrainer):
    """Resolves the optimizer of a training, and leaves one behind when its coordinates are gone."""

    zo: ZerothOrder | None = None
    optimizer: Any
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
        if is_schedule_free(kind):
            check(Case(self.args.settings(), vars(self.args), self._facts | {"schedule-free"}))
        return kind, arguments

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
