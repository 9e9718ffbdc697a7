"""Messages between the stages of a pipeline: activations to the next one, and outputs of the last one to all.

Activations go one way, without an answer:

    stage 0  →  stage 1  →  …  →  last stage          rows × tokens × width numbers for every forward pass

A send returns at once, so that a stage begins with its next forward pass while the last one is under way. A receive may
begin ahead, while the stage still computes the pass before. Messages between two stages arrive in the order in which they
were sent, and both stages make the same forward passes, so no message says which pass it belongs to.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.utils import ModelOutput

from zo_hf.parallel.ranks import Ranks

#: Messages that may wait for their receiver. More would only take memory: a later stage is no faster for them.
IN_FLIGHT = 4

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Channel:
    """The connections of this process with the other stages of its pipeline.

    Args:
        ranks: the processes of the run.
        device: device on which they communicate.
        timeout: seconds to wait for another process.

    Attributes:
        in_tuple: True if the model's layers return a tuple, of which the hidden states are the first entry.
    """

    def __init__(self, ranks: Ranks, device: torch.device, timeout: float) -> None:
        self._ranks, self._device = ranks, device
        grid = ranks.grid
        self._rank, self._last = grid.rank, grid.rank - grid.stage + grid.stages - 1
        self._group: Any = None  # all processes, if they are one pipeline
        if grid.world_size > grid.stages:
            for first in range(
                0, grid.world_size, grid.stages
            ):  # every process takes part in the making of every group
                members = list(range(first, first + grid.stages))
                group = dist.new_group(members, timeout=timedelta(seconds=timeout))
                self._group = group if grid.rank in members else self._group
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._arriving: tuple[Any, Tensor] | None = None
        self._dtype = torch.float32
        self.in_tuple = False

    @property
    def is_last(self) -> bool:
        """True if this process is the last stage."""
        return self._rank == self._last

    def send(self, hidden: Tensor, in_tuple: bool, described: bool) -> None:
        """Send activations to the next stage, without waiting for it.

        Args:
            hidden: hidden states behind this stage's last layer, of any shape.
            in_tuple: True if the layer has returned them in a tuple.
            described: True sends their dtype and form first; later ones are alike.
        """
        if described:
            kind = torch.tensor([_DTYPES.index(hidden.dtype), in_tuple], device=self._device)
            self._send(kind)
        self._send(hidden.detach().contiguous())

    def _send(self, tensor: Tensor) -> None:
        while len(self._sent) >= IN_FLIGHT:
            self._sent.popleft()[0].wait()
        self._sent.append((dist.isend(_as_bytes(tensor), self._rank + 1), tensor))
        self._ranks.count_bytes(tensor)

    def receive(self, like: Tensor, described: bool, ahead: bool = False) -> Tensor:
        """Receive the activations of the stage before.

        Args:
            like: a tensor of their shape, on the device of this stage's layers.
            described: as for `send`.
            ahead: True begins to receive the next ones, which have the same shape and are not described.
        """
        if described:
            kind = torch.empty(2, dtype=torch.int64, device=self._device)
            dist.recv(_as_bytes(kind), self._rank - 1)
            code, in_tuple = kind.tolist()
            self._dtype, self.in_tuple = _DTYPES[code], bool(in_tuple)
        work, hidden = self._arriving or self._begin(like)
        self._arriving = self._begin(like) if ahead else None
        work.wait()
        return hidden

    def _begin(self, like: Tensor) -> tuple[Any, Tensor]:
        hidden = torch.empty(like.shape, dtype=self._dtype, device=like.device)
        return dist.irecv(_as_bytes(hidden), self._rank - 1), hidden

    def share(self, outputs: Any) -> Any:
        """Give all stages the outputs of the last one.

        Args:
            outputs: outputs of the model, as a mapping or a sequence; the other stages give None.

        Returns:
            The tensors among them, as a `ModelOutput` or a tuple; the last stage gets its own outputs back.
        """
        described: dict[str, Any] = {}
        tensors: list[Tensor] = []
        if self.is_last:
            named = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
            held = [(name, value) for name, value in named if isinstance(value, Tensor)]
            tensors = [value for _, value in held]
            described = {
                "names": [name for name, _ in held] if isinstance(outputs, Mapping) else None,
                "kinds": [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors],
            }
        described = json.loads(self._text(json.dumps(described).encode()))
        if not self.is_last:
            kinds: Sequence[tuple[str, list[int]]] = described["kinds"]
            tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device=self._device) for dtype, shape in kinds]
        for tensor in tensors:
            if tensor.numel():
                self._broadcast(tensor)
        if self.is_last:
            return outputs
        if described["names"] is None:
            return tuple(tensors)
        received = ModelOutput()
        for name, tensor in zip(described["names"], tensors, strict=True):
            received[name] = tensor
        return received

    def _text(self, own: bytes) -> bytes:
        """Return the text of the last stage."""
        length = torch.tensor(len(own), device=self._device)
        self._broadcast(length)
        text = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_last:
            text = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        text = text.to(self._device)
        self._broadcast(text)
        return bytes(text.tolist())

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(_as_bytes(tensor.detach().contiguous()), self._last, group=self._group)
        if self.is_last:
            self._ranks.count_bytes(tensor)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)  # not every backend knows every dtype
