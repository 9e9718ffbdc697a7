"""One stage of a pipeline: forward passes of a model whose layers are divided among processes.

Forward-only training has no backward stream, so activations flow one way, and a stage never waits for a later one:

    stage 0     | pass 1 | pass 2 | pass 3 | …
    stage 1              | pass 1 | pass 2 | pass 3 | …
    last stage                    | pass 1 | pass 2 | pass 3 | …  → losses

Every process calls the same model on the same batch. It computes everything around the layers, such as masks and positions,
itself. The layers of earlier stages are skipped: the first one gives the activations that have arrived. Behind
its own last layer a stage sends its activations on, and ends the forward pass by an exception.

Two kinds of passes differ in what comes back. By default all stages get the outputs of the last one, so that a forward of
the model is one like any other. While the pipeline streams, nothing comes back, and nobody waits: `PassedOn` leaves the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zo_hf.evaluation.passed_on import PassedOn
from zo_hf.evaluation.without_cache import configs_with_cache, without_cache
from zo_hf.parallel.channel import Channel
from zo_hf.reason import reason_of


class Stage:
    """The layers of a model that this process runs, in place for good.

    Args:
        model: the transformers model, without wrappers of PEFT.
        layers: its stack of layers.
        own: indices of the layers of this stage, in order and without gaps.
        channel: the connections with the other stages.

    Attributes:
        streams: True while forward passes end without outputs.
        more: number of passes that follow the present one on the same batch, as far as that is known.
        has_failed: True if a forward pass has raised, so that the stages are no longer at the same pass.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, own: range, channel: Channel) -> None:
        self._channel, self._configs = channel, configs_with_cache(model)
        self._kind = type(model).__name__
        self.streams = self.has_failed = False
        self.more = 0
        self._has_begun = self._is_between = False
        _replace_forward(model, self._forward)
        for index, layer in enumerate(layers):
            if index not in own:
                _replace_forward(layer, functools.partial(self._skip, index == 0))
                continue
            if index == own[0] != 0:
                _replace_forward(layer, self._first_own)
            if index == own[-1] and not channel.is_last:
                _replace_forward(layer, self._last_own)
            if index == 0:
                _replace_forward(layer, self._first_of_all)

    def expect(self, more: int) -> None:
        """Note how many passes follow the one that begins, on the same batch."""
        self.more = more

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Let forward passes inside this context end without outputs; all stages must make the same ones.

        A pass before, with outputs, must have been made at the same precision.
        """
        self.streams = True
        try:
            yield
        finally:
            self.streams, self.more = False, 0

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        try:
            with without_cache(self._configs):
                outputs = forward(*args, **kwargs)
        except PassedOn:
            self._has_begun = False
            if self.streams:
                raise
            return self._channel.share(None)
        except BaseException as error:
            self.has_failed |= self._has_begun
            if self._is_between and isinstance(error, (IndexError, TypeError, ValueError)):
                raise self._refusal("return more than hidden states") from error
            if isinstance(error, torch.OutOfMemoryError):
                reason = reason_of(error)
                raise torch.OutOfMemoryError(
                    "a stage of the pipeline ran out of memory in a forward pass that other stages have begun "
                    f"({reason}); set zo_batched_probes=False or smaller batches, and resume from the last "
                    "checkpoint."
                ) from error
            raise
        self._has_begun = False
        return outputs if self.streams else self._channel.share(outputs)

    def _skip(self, is_first: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for a layer of another stage; the first one gives what has arrived."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if is_first:
            self._has_begun = True
            hidden = self._channel.receive(hidden, not self.streams, ahead=self.streams and self.more > 0)
        self._is_between = True
        return (hidden,) if self._channel.in_tuple else hidden

    def _first_own(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_between = False
        if not self.streams:
            others = tree_leaves(
                (args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
            )
            floats = (leaf for leaf in others if isinstance(leaf, Tensor) and leaf.is_floating_point())
            if any(bool(leaf.isnan().any()) for leaf in floats):
                raise self._refusal("read weights outside of the layers, which other stages hold")
        return forward(*args, **kwargs)

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"zo_parallel='pipeline' cannot divide the layers of {self._kind}, which {why}; use zo_parallel='data', or fsdp=... "
            "for a model that does not fit on one device."
        )

    def _first_of_all(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._has_begun = True
        return forward(*args, **kwargs)

    def _last_own(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        in_tuple = isinstance(output, tuple)
        self._channel.send(output[0] if in_tuple else output, in_tuple, described=not self.streams)
        raise PassedOn


def _replace_forward(module: nn.Module, by: Callable[..., Any]) -> None:
    """Let a module call `by(forward, ...)` in place of its forward; it keeps the signature."""
    forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(by, forward), forward)  # type: ignore[method-assign]
