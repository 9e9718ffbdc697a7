"""Evaluation of a step's probes, one after another or all in one batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from zo_hf.directions import Distribution
from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation import free_memory
from zo_hf.evaluation.derivative import loss_and_derivative, own_passes
from zo_hf.evaluation.kept_buffers import KeptBuffers
from zo_hf.evaluation.pass_graphs import NotCapturable, PassGraphs
from zo_hf.evaluation.passed_on import loss_or_zeros
from zo_hf.evaluation.precision import coarsest, rounding
from zo_hf.evaluation.row_losses import RowLosses, model_rows
from zo_hf.evaluation.without_cache import configs_with_cache, without_cache
from zo_hf.evaluation.written_parameters import WrittenParameters
from zo_hf.reason import reason_of
from zo_hf.rng import StreamOf
from zo_hf.rng.global_generators import GlobalGenerators
from zo_hf.subspaces.packing import Packing
from zo_hf.subspaces.subspace import Subspace

logger = logging.getLogger(__name__)


@runtime_checkable
class BatchableLoss(Protocol):
    """A loss that can also be evaluated for several probes in one forward pass.

    Attributes:
        rows: rows of the batch.
    """

    rows: int

    def __call__(self) -> Tensor: ...

    def batched(self, copies: int) -> Tensor: ...


class Evaluation(Protocol):
    """The losses of one batch at the probes of a step.

    Attributes:
        device: the device of the losses.
        subspace: perturbs the model.
        generators: the state of the global generators at which every evaluation begins; None leaves them alone.
        why_not_batchable: why one forward pass cannot have all probes, as far as the loss tells; None if it may.
    """

    device: torch.device
    subspace: Subspace
    generators: GlobalGenerators | None

    @property
    def why_not_batchable(self) -> str | None: ...

    def sequential(self) -> Tensor:
        """Return the losses of one forward pass for each probe, (probes, ...)."""

    def batched(self) -> Tensor:
        """Return the same from one forward pass for all probes."""


#: Enters a context in which the model computes at some probes, given them and the rows that each has in a batch; see
#: `Subspace.at`.
At = Callable[[Sequence[Probe], int], AbstractContextManager[None]]


@runtime_checkable
class JointLoss(Protocol):
    """A loss whose values at the probes of a step depend on each other, such as a fitness within a population."""

    def __call__(self) -> Tensor: ...

    def losses_at(self, probes: Sequence[Probe], at: At) -> Tensor:
        """Return the losses at the probes, (len(probes),), and evaluate the model at them as it sees fit."""


class ProbeEvaluator:
    """Evaluates the losses at a list of probes.

    Args:
        batched: True, False, or "auto". "auto" evaluates the first step's probes in both ways, and chooses one batch
            if the losses are the same.

    Attributes:
        batched: the choice; None until "auto" has decided.
        forward_passes: loss evaluations so far, including those of other processes on the same batch.
        dtype: dtype of the losses that the closure last returned.
        autocast_dtype: the dtype in which autocast lets the model compute; None computes in the parameters' dtype.
        all_reduce_and: turns this process's answer into the AND over all processes, which must make the same forward
            passes. It takes the answer as a tensor on the losses' device.
        graphs: the CUDA graphs of forward passes that several probes share; None launches every operation.
        recover: makes the model usable after a forward pass that raised. It is set only where all processes make a
            forward pass together.
        expect: takes the number of forward passes that follow the next one on the same batch.
    """

    def __init__(self, batched: bool | str = "auto") -> None:
        self.batched = None if batched == "auto" else bool(batched)
        self._must_batch = batched is True
        self.forward_passes = 0
        self.dtype = torch.float32
        self.autocast_dtype: torch.dtype | None = None
        self.all_reduce_and: Callable[[Tensor], bool] = bool
        self.graphs: PassGraphs | None = None
        self.recover: Callable[[], None] | None = None
        self.expect: Callable[[int], None] = lambda more: None
        self._has_batched = False
        self._has_failed = False
        self._configs: list[PretrainedConfig] | None = None
        self._buffers: KeptBuffers | None = None
        self._written: WrittenParameters | None = None

    @contextmanager
    def at(
        self,
        subspace: Subspace,
        probes: Sequence[Probe],
        stream_of: StreamOf,
        distribution: Distribution,
        rows: int = 0,
        packing: Packing | None = None,
    ) -> Iterator[None]:
        """Evaluate the model at the probes as `Subspace.at` does, without a key-value cache, and leave it as it is."""
        if self._configs is None:
            self._configs = configs_with_cache(subspace.model)
        at = subspace.at(probes, stream_of, distribution, rows, packing)
        with without_cache(self._configs), self.leaving_model(subspace), at:
            yield

    @contextmanager
    def leaving_model(self, subspace: Subspace, is_probe: bool = True, runs: bool = True) -> Iterator[None]:
        """Leave the model as it is: restore the buffers that its forward writes after this context, and refuse other writes.

        Args:
            subspace: the subspace of the model.
            is_probe: False for a metric; see `WrittenParameters.refused`.
            runs: True if the model surely runs in the context.
        """
        if self._buffers is None or self._written is None:
            self._buffers, self._written = KeptBuffers(subspace.model, subspace.quantized), WrittenParameters(subspace)
        with self._written.refused(is_probe, runs), self._buffers.kept(runs):
            yield

    def losses(
        self,
        subspace: Subspace,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        stream_of: StreamOf,
        distribution: Distribution,
        count: int | None = None,
        generators: GlobalGenerators | None = None,
        batched: bool | None = None,
    ) -> Tensor:
        """Return the losses at the probes, (len(probes),), in float64 (float32 on a device without it).

        Args:
            subspace: perturbs the model.
            closure: returns the loss at the current point: a number, or a tensor with one element. A `JointLoss` returns
                those of all probes.
            probes: the points at which to evaluate the loss.
            stream_of: the random stream of each direction.
            distribution: the distribution of the directions.
            count: forward passes that all processes together make on this batch; None means `len(probes)`.
            generators: the state of the global generators at which every evaluation begins; None leaves them alone.
            batched: a choice for this call alone; None takes the run's.

        Raises:
            NotBatchable: batched evaluation was requested, and the model or the loss cannot do it.
            ValueError: the loss is not one number; or a derivative was requested and cannot be computed, see
                `loss_and_derivative`.
        """
        count = len(probes) if count is None else count
        self.forward_passes += count
        if isinstance(closure, JointLoss):

            @contextmanager
            def at(points: Sequence[Probe], rows: int) -> Iterator[None]:
                with self.leaving_model(subspace), subspace.at(points, stream_of, distribution, rows=rows):
                    yield

            with torch.no_grad():
                return closure.losses_at(probes, at)
        evaluation = _Evaluation(self, subspace, closure, probes, stream_of, distribution, generators)
        batched = self.batched if batched is None else batched
        with torch.no_grad():
            if batched is None:
                free_memory.watch(evaluation.device)
                values = self.choose(evaluation, evaluation.sequential(), count)
            else:
                values = self.in_one_batch(evaluation) if batched else evaluation.sequential()
        self.dtype = values.dtype
        return values.float() if values.device.type == "mps" else values.double()

    def in_one_batch(self, evaluation: Evaluation) -> Tensor:
        """Return the losses from one forward pass, (probes, ...), or one at a time for a batch on which it fails.

        Raises:
            NotBatchable: `zo_batched_probes=True`, and not even the first batch can be evaluated so.
        """
        try:
            values = evaluation.batched()
            self._has_batched = True
            return values
        except Exception as error:
            if self.recover is not None or isinstance(error, NotCapturable):
                raise  # other processes may be in the middle of the same forward pass, waiting for this one
            if isinstance(error, NotBatchable) and self._must_batch and not self._has_batched:
                way_out = "zo_batched_probes='auto'" + (" and zo_cuda_graph=False" if self.graphs is not None else "")
                raise NotBatchable(
                    f"zo_batched_probes=True cannot evaluate the probes in one batch: {error}; use {way_out}."
                ) from error
            if not self._has_failed:
                logger.warning(
                    "a forward pass for all probes failed (%s: %s); a batch like this is evaluated one probe at a time",
                    type(error).__name__,
                    reason_of(error),
                )
            self._has_failed = True
        # Only here, outside of the handler, has the traceback given back the memory of the failed forward pass.
        return evaluation.sequential()

    def in_one_pass(self, loss: Any, parts: tuple[int, ...], run: Callable[[Any], Tensor]) -> Tensor:
        """Return `run(loss)`, the losses of several probes from one forward pass, launched or replayed.

        Args:
            loss: the loss of the batch.
            parts: the copies of the batch, (copies,), or the groups of its rows and the copies, (groups, copies).
            run: evaluates the loss.
        """
        return run(loss).detach() if self.graphs is None else self.graphs.losses(loss, parts, run)

    def choose(self, evaluation: Evaluation, expected: Tensor, count: int) -> Tensor:
        """Evaluate a batch once more, in one forward pass, and choose how the run evaluates its probes.

        Args:
            evaluation: the batch.
            expected: its losses one after another, (probes, ...). Since before, `free_memory` has watched the device.
            count: forward passes that all processes together make on this batch.

        Returns:
            The losses of the way that is chosen, (probes, ...).
        """
        problem = evaluation.why_not_batchable or free_memory.why_too_large(evaluation.device, len(expected))
        if not self.all_reduce_and(torch.tensor(problem is None, device=expected.device)):
            self._choose(False, problem or "another process has another loss, or lacks the memory")
            return expected
        after = None if evaluation.generators is None else GlobalGenerators.now(evaluation.device)
        try:
            actual = evaluation.batched()
            self.forward_passes += count
        except Exception as error:  # out of memory, a shape that the model fixes, an input of another meaning, ...
            if self.recover is not None:
                if not isinstance(error, NotBatchable):
                    raise  # other processes may be in the middle of the same forward pass, waiting for this one
                self.recover()
            self.all_reduce_and(torch.tensor(False, device=expected.device))
            self._choose(False, reason_of(error))
            return expected
        finally:
            if after is not None:
                after.restore()
        apart = _spread(expected).abs().max().item()
        level = (actual.mean(0) - expected.mean(0)).abs().max().item()
        difference = (_spread(actual) - _spread(expected)).abs().max().item()
        explained = rounding(self.dtype_of_computation(evaluation.subspace, expected.dtype))
        allowed = explained * max(1.0, expected.abs().max().item()) + 0.02 * apart
        close = max(level, difference) <= allowed
        if not self.all_reduce_and(torch.tensor(close, device=expected.device)):
            where = "on another process" if close else f"by {max(level, difference):.2g}"
            self._choose(False, f"in one batch the losses differ {where}")
            return expected
        self._has_batched = True
        self._choose(True, f"in one batch the losses agree to {difference:.2g}")
        return actual

    def dtype_of_computation(self, subspace: Subspace, losses: torch.dtype) -> torch.dtype:
        """Return the coarsest dtype on the way to losses of dtype `losses`."""
        return coarsest(subspace.model, losses, self.autocast_dtype)

    def _choose(self, batched: bool, reason: str) -> None:
        self.batched = batched
        logger.info("zo_batched_probes='auto' chose %s: %s", batched, reason)


class _Evaluation:
    """The losses of one batch at a list of probes; the arguments are those of `ProbeEvaluator.losses`."""

    def __init__(
        self,
        evaluator: ProbeEvaluator,
        subspace: Subspace,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        stream_of: StreamOf,
        distribution: Distribution,
        generators: GlobalGenerators | None,
    ) -> None:
        self._evaluator, self.subspace, self.closure, self.generators = evaluator, subspace, closure, generators
        self._probes, self._stream_of, self._distribution = probes, stream_of, distribution
        self.device = subspace.device

    def sequential(self) -> Tensor:
        """Return the losses of one forward pass for each probe, (probes,)."""
        values = []
        passes = own_passes(self._probes)
        for more, probe in zip(reversed(range(len(passes))), passes, strict=True):
            self._evaluator.expect(more)
            self._begin()
            with self._evaluator.at(self.subspace, (probe,), self._stream_of, self._distribution):
                values.append(loss_and_derivative(self._loss) if probe.derivative else self._loss().detach()[None])
        return torch.cat(values)

    @property
    def why_not_batchable(self) -> str | None:
        """Why one forward pass cannot have all probes, as far as the loss tells; None if it may."""
        return None if isinstance(self.closure, BatchableLoss) else "the loss is not the model's own"

    def batched(self) -> Tensor:
        """Return the losses of one forward pass for all probes, (probes,).

        Raises:
            NotBatchable: the model or the loss cannot do it, or the loss has drawn random numbers.
        """
        if not isinstance(self.closure, BatchableLoss):
            raise NotBatchable(self.why_not_batchable)
        self._begin()
        rows, copies = model_rows(self.closure), len(self._probes)
        with self._evaluator.at(self.subspace, self._probes, self._stream_of, self._distribution, rows=rows):
            losses = loss_or_zeros(
                lambda: self._evaluator.in_one_pass(self.closure, (copies,), lambda loss: loss.batched(copies)),
                (copies,),
                self._evaluator.dtype,
                self.device,
            )
        check_draws_nothing(self.generators)
        return losses

    def _begin(self) -> None:
        if self.generators is not None:
            self.generators.restore()

    def _loss(self) -> Tensor:
        return loss_or_zeros(lambda: one_number(self.closure(), self.device), (), self._evaluator.dtype, self.device)


def check_draws_nothing(generators: GlobalGenerators | None) -> None:
    """Refuse a loss of several probes that has drawn random numbers since the generators were restored.

    Raises:
        NotBatchable: it has.
    """
    if generators is not None and generators.have_moved():
        raise NotBatchable("the loss draws random numbers, and in one batch they would differ between probes")


def one_number(loss: Any, device: torch.device) -> Tensor:
    """Return a loss as a scalar tensor, ().

    Args:
        loss: a number of Python or numpy, a tensor or array with one element, or `RowLosses`, which stands for its mean.
        device: the device for a loss that is no tensor.

    Raises:
        ValueError: it is something else; the message names its shape or type.
    """
    if isinstance(loss, RowLosses):
        return loss.mean_loss()
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    if isinstance(loss, Real) or (isinstance(loss, np.ndarray) and loss.size == 1):
        return torch.tensor(float(loss), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    if isinstance(loss, Tensor | np.ndarray):
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, but a probe needs one number; reduce it in compute_loss or the "
            "closure, for example with .mean(), or return RowLosses."
        )
    raise ValueError(f"the loss is a {type(loss).__name__}; compute_loss or the closure must return one number.")


def _spread(losses: Tensor) -> Tensor:
    """Return losses, (probes, ...), minus their mean over probes; an estimate depends on these differences alone."""
    return losses - losses.mean(0)
