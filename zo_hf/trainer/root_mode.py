"""The root module says that it trains, while the model computes in evaluation mode.

Probes run without dropout. Trainer subclasses, TRL's among them, ask `model.training` whether they compute the loss of a
training or of an evaluation. So only the flag of the root is set, and only while no forward of the root runs: code of the
root's forward that reads the flag sees evaluation mode, too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from zo_hf.evaluation.output_hooks import leaves_outputs
from zo_hf.trainer.stop_gradient import StopGradients


class RootMode:
    """Keeps a model in evaluation mode, with a root that says that it trains."""

    def __init__(self) -> None:
        self._called: nn.Module | None = None
        self._roots: tuple[nn.Module, ...] = ()
        self._switched: list[nn.Module] = []
        self._handles: list[Any] = []
        self._before: list[tuple[list[bool], StopGradients | None]] = []

    def enter(self, called: nn.Module, model: nn.Module) -> None:
        """Bring the model into this state, whatever has called its `train` or `eval` since.

        Args:
            called: the module that the loss calls, such as a compiled wrapper of the model.
            model: the Trainer's model, whose flag subclasses read.
        """
        if self._called is not called:
            self.leave()
            self._called = called
            self._roots = (called,) if called is model else (called, model)
            # A model may keep some children in evaluation mode whatever its `train` is told.
            self._switched = [child for child in _below(model) if child.training] or _below(model)
            if called.training or model.training:
                called.eval()
                model.eval()
            self._handles = [
                called.register_forward_pre_hook(self._begin, prepend=True),
                called.register_forward_hook(self._end, always_call=True),
            ]
        elif all(child.training for child in self._switched):
            # Somebody has called model.train(), as generation callbacks do.
            called.eval()
            model.eval()
        for root in self._roots:
            root.training = True

    def leave(self) -> None:
        """Leave the model in evaluation mode, flag included."""
        for handle in self._handles:
            handle.remove()
        for root in self._roots:
            root.training = False
        self._called, self._roots, self._switched, self._handles, self._before = None, (), [], [], []

    def _begin(self, *_: Any) -> None:
        self._before.append(([root.training for root in self._roots], StopGradients.suspend()))
        for root in self._roots:
            root.training = False

    @leaves_outputs
    def _end(self, *_: Any) -> None:
        flags, suspended = self._before.pop()
        for root, flag in zip(self._roots, flags, strict=True):
            root.training = flag
        StopGradients.resume(suspended)


def _below(model: nn.Module) -> list[nn.Module]:
    return list(model.children()) or [model]
