"""Evaluating the probes of a step: one after another, or all in one batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.probes.derivative import loss_and_derivative
from zo_hf.probes.probe import NotBatchable, Probe
from zo_hf.subspaces.subspace import StreamOf, Subspace

logger = logging.getLogger(__name__)

# How far batched and sequential losses may differ, relative to the loss: rounding, by the dtype they are computed in.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@runtime_checkable
class BatchableLoss(Protocol):
    """A loss that can also be evaluated for several probes in one forward pass."""

    rows: int

    def __call__(self) -> Tensor: ...

    def batched(self, copies: int) -> Tensor: ...


class ProbeEvaluator:
    """Losses at a list of probes.

    Args:
        batched: True, False, or "auto": in one batch if that gives the same losses as one after another, which the
            first step checks by doing both.

    Attributes:
        batched: the choice made; None until "auto" has decided.
        forward_passes: evaluations of the loss so far, those that other processes made of the same batch included.
        dtype: that of the losses as the closure last returned them.
        agree: turns this process's answer into that of all, who must make the same forward passes and whose choice one
            checkpoint holds; takes it as a tensor on the device of the losses.
        recover: where a forward is made by all processes together, makes the model usable after one that raised.
    """

    def __init__(self, batched: bool | str = "auto") -> None:
        self.batched = None if batched == "auto" else bool(batched)
        self.forward_passes = 0
        self.dtype = torch.float32
        self.agree: Callable[[Tensor], bool] = bool
        self.recover: Callable[[], None] | None = None

    def losses(
        self,
        subspace: Subspace,
        closure: Callable[[], Tensor],
        probes: Sequence[Probe],
        stream_of: StreamOf,
        distribution: Distribution,
        count: int | None = None,
    ) -> Tensor:
        """Losses at the probes, float64 (float32 where the device has none) of shape (len(probes),).

        Args:
            count: forward passes that all processes make of this batch together; None: only these.

        Raises:
            NotBatchable: batched evaluation was asked for and the model or the loss cannot do it.
            ValueError: a derivative was asked for and cannot be had, see `loss_and_derivative`.
        """
        count = len(probes) if count is None else count

        def sequential() -> Tensor:
            values = []
            for probe, following in itertools.zip_longest(probes, probes[1:]):
                if following is not None and following.derivative:
                    continue  # its loss comes with its derivative
                with subspace.at((probe,), stream_of, distribution):
                    values.append(loss_and_derivative(closure) if probe.derivative else closure().detach()[None])
            return torch.cat(values)

        def batched() -> Tensor:
            if not isinstance(closure, BatchableLoss):
                raise NotBatchable("the loss is not the model's own")
            with subspace.at(probes, stream_of, distribution, rows=closure.rows):
                return closure.batched(len(probes)).detach()

        self.forward_passes += count
        with torch.no_grad():
            if self.batched is None:
                values = self._decide(closure, sequential, batched, count)
            else:
                values = batched() if self.batched else sequential()
        self.dtype = values.dtype
        return values.float() if values.device.type == "mps" else values.double()

    def _decide(
        self,
        closure: Callable[[], Tensor],
        sequential: Callable[[], Tensor],
        batched: Callable[[], Tensor],
        count: int,
    ) -> Tensor:
        expected = sequential()
        if not isinstance(closure, BatchableLoss):
            self._choose(False, "the loss is not the model's own")
            return expected
        try:
            actual = batched()
            self.forward_passes += count
        except (RuntimeError, ValueError) as error:  # NotBatchable, out of memory, or a shape that the model fixes
            if self.recover is not None:
                if not isinstance(error, NotBatchable):
                    raise  # the others may be in the middle of the same forward, and wait for this process
                self.recover()
            self.agree(torch.tensor(False, device=expected.device))
            self._choose(False, str(error).split("\n")[0])
            return expected
        difference = (_spread(actual) - _spread(expected)).abs().max().item()
        allowed = _ROUNDING.get(expected.dtype, 3e-2) * max(1.0, expected.abs().max().item())
        close = difference <= allowed + 0.02 * _spread(expected).abs().max().item()
        if not self.agree(torch.tensor(close, device=expected.device)):
            where = "on another process" if close else f"by {difference:.2g}"
            self._choose(False, f"in one batch the losses differ {where}")
            return expected
        self._choose(True, f"in one batch the losses agree to {difference:.2g}")
        return actual

    def _choose(self, batched: bool, reason: str) -> None:
        self.batched = batched
        logger.info("zo_batched_probes='auto' chose %s: %s", batched, reason)


def _spread(losses: Tensor) -> Tensor:
    """Losses relative to their mean: what the estimate is made of."""
    return losses - losses.mean()
