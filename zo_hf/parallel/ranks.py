"""Several processes as one run: the grid of ranks, their collectives, and the check that all ranks still agree.

Every rank holds the whole model, evaluates its own probes on its own rows, and shares the losses with all others. Only
these few scalars cross the network. All ranks then average the losses in the same order and make the same update.

Ranks form a grid of `data` × `directions`: neighbors share a batch and evaluate different directions of the step,

    rank = data_index · directions + direction_index        direction i belongs to direction_index = i mod directions
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from zo_hf.estimators.probe import Probe
from zo_hf.parallel.checksum import tensor_checksum

PARALLEL = ("data", "directions", "both")

# A replica check reads all coordinates and one in ROTATION of the other weights, different ones at each check.
ROTATION = 8


class ReplicasDiffer(RuntimeError):
    """Raised if ranks that should have the same weights, arguments or batch do not."""


@dataclass(frozen=True)
class Grid:
    """The place of one rank in the grid of a run.

    Attributes:
        data: number of different batches in a step.
        directions: number of ranks that share a batch.
        rank: number of this process, from 0.
    """

    data: int = 1
    directions: int = 1
    rank: int = 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.directions

    @property
    def data_index(self) -> int:
        """Index of the batch that this rank evaluates."""
        return self.rank // self.directions

    @property
    def direction_index(self) -> int:
        """Index of this rank in its row. The rank evaluates the directions that equal it modulo `directions`."""
        return self.rank % self.directions

    def own(self, probes: Sequence[Probe]) -> list[int]:
        """Return the positions of the probes that this rank evaluates."""
        return [i for i, probe in enumerate(probes) if probe.direction % self.directions == self.direction_index]

    def mean_losses(self, gathered: Tensor, probes: Sequence[Probe]) -> Tensor:
        """Average the losses of all ranks over the batches.

        Args:
            gathered: losses of every rank at its own probes, (world_size, largest number of own probes).
            probes: all probes of the step.

        Returns:
            (len(probes),), the same bits on every rank, because all of them add in the order of the ranks.
        """
        mean = gathered.view(self.data, self.directions, -1).mean(0)
        losses = mean.new_empty(len(probes))
        for index in range(self.directions):
            own = Grid(self.data, self.directions, index).own(probes)
            losses[own] = mean[index, : len(own)]
        return losses


def make_grid(parallel: str, world_size: int, rank: int, num_directions: int) -> Grid:
    """Build the grid for `zo_parallel`.

    "data" gives every rank a batch of its own. "directions" gives all ranks the same batch. "both" shares a batch
    among as many ranks as possible: the largest number that divides both the ranks and the directions.

    Args:
        parallel: one of `PARALLEL`.
        world_size: number of ranks.
        rank: number of this process.
        num_directions: q, number of directions of a step.

    Raises:
        ValueError: "directions" cannot divide the directions equally among the ranks.
    """
    if parallel == "data":
        return Grid(world_size, 1, rank)
    if parallel == "both":
        directions = math.gcd(world_size, num_directions)
        return Grid(world_size // directions, directions, rank)
    if num_directions % world_size:
        raise ValueError(
            f"zo_parallel='directions' cannot divide zo_num_directions={num_directions} equally among {world_size} "
            "processes; use a multiple, or zo_parallel='both', which also divides the data."
        )
    return Grid(1, world_size, rank)


class Ranks:
    """The collectives of a run. In a run of a single process they send nothing and need no torch.distributed.

    Args:
        grid: place of this rank; None means a single process.

    Attributes:
        bytes_sent: payload in bytes that this rank has contributed to collectives so far.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        self.grid = grid if grid is not None else Grid()
        self.bytes_sent = 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks, equal in shape and dtype, to shape (world_size, *tensor.shape)."""
        if self.grid.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.grid.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        self.count_bytes(tensor)
        return torch.stack(parts)

    def all_reduce_and(self, vote: Tensor) -> bool:
        """Return True if `vote`, bool of shape (), is True on every rank."""
        return bool(self.all_gather(vote).all())

    def shared_by_all(self, names: Sequence[str], own: Collection[str], device: torch.device) -> list[str]:
        """Return the names that every rank has among its own.

        Args:
            names: all names, in the same order on every rank.
            own: this rank's names, some of `names`.
            device: device on which the ranks communicate.
        """
        if self.all_reduce_and(torch.tensor(not own, device=device)):
            return []
        shared = self.all_gather(torch.tensor([name in own for name in names], device=device)).all(0)
        return [name for name, is_shared in zip(names, shared.tolist(), strict=True) if is_shared]

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor`, of any shape and dtype, with that of the first rank."""
        if self.grid.world_size == 1:
            return
        held = tensor.detach().contiguous()
        dist.broadcast(held.view(-1).view(torch.uint8), 0)  # as bytes: not every backend knows every dtype
        self.count_bytes(held)
        if held.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(held)

    def barrier(self) -> None:
        """Wait until every rank has reached this point."""
        if self.grid.world_size > 1:
            # Without device_ids, NCCL guesses the GPU of this process.
            dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)

    def count_bytes(self, tensor: Tensor) -> None:
        """Add the bytes of `tensor`, which has been sent, to `bytes_sent`."""
        self.bytes_sent += tensor.numel() * tensor.element_size()

    def mean_losses(self, losses: Tensor, probes: Sequence[Probe]) -> Tensor:
        """Average the losses of all ranks over the batches.

        Args:
            losses: losses of this rank at its own probes, (own probes,).
            probes: all probes of the step.

        Returns:
            (len(probes),) on the CPU, the same bits on every rank.
        """
        # Ranks may have different numbers of probes, but a collective needs equal shapes.
        most = max(len(replace(self.grid, rank=rank).own(probes)) for rank in range(self.grid.directions))
        padded = losses if len(losses) == most else torch.nn.functional.pad(losses, (0, most - len(losses)))
        # To the host, which reads them next, in one transfer that it waits for.
        return self.grid.mean_losses(self.all_gather(padded).cpu(), probes)

    def check_replicas(
        self, coordinates: Mapping[str, Tensor], weights: Mapping[str, Tensor], turn: int | None, step: int
    ) -> None:
        """Compare the checksums of all coordinates, and of one in `ROTATION` of the weights or of all, between ranks.

        Args:
            coordinates: coordinate tensors, by name.
            weights: weights, by name; every rank has the same names.
            turn: number of the check, so that successive checks read different weights; None reads all of them.
            step: number of the step, for the message.

        Raises:
            ReplicasDiffer: the checksums differ; the message names the step, the ranks and the first such tensor.
        """
        if self.grid.world_size == 1:
            return
        tensors = {f"the coordinates of {name}": tensor for name, tensor in coordinates.items()}
        tensors |= {
            name: tensor
            for i, (name, tensor) in enumerate(weights.items())
            if turn is None or i % ROTATION == turn % ROTATION
        }
        if not tensors:
            return
        sums = torch.tensor([_signed(tensor_checksum(tensor)) for tensor in tensors.values()])
        device = next(iter(tensors.values())).device
        if len(set(self.all_gather(_digest(sums).to(device)).tolist())) == 1:
            return
        all_sums = self.all_gather(sums.to(device)).cpu()  # (world_size, tensors)
        first = int((all_sums != all_sums[0]).any(0).nonzero()[0])
        name = list(tensors)[first]
        usual = Counter(all_sums[:, first].tolist()).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(all_sums[:, first].tolist()) if value != usual]
        raise ReplicasDiffer(
            f"at step {step} rank {', '.join(map(str, odd))} of {self.grid.world_size} differs from the rest, first "
            f"in {name}; resume from the last checkpoint, and look for faulty hardware or code that changes one rank."
        )

    def check_shared_batch(self, inputs: object, device: torch.device) -> None:
        """Check that the ranks in one row of the grid were given the same batch.

        Args:
            inputs: the batch: tensors of any shape and dtype in dicts, lists and tuples.
            device: device on which the ranks communicate.

        Raises:
            ReplicasDiffer: their batches differ.
        """
        if self.grid.directions == 1:
            return
        sums = [_signed(tensor_checksum(leaf)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        all_sums = self.all_gather(_digest(torch.tensor(sums)).to(device)).view(self.grid.data, self.grid.directions)
        if not bool((all_sums == all_sums[:, :1]).all()):
            raise ReplicasDiffer(
                "zo_parallel: ranks that should share a batch were given different batches; make the training data "
                "and its order the same on every rank."
            )


def share_batches(dataloader: DataLoader, grid: Grid) -> None:
    """Give the ranks in one row of the grid the same batches, although accelerate gave each rank its own.

    Args:
        dataloader: dataloader that accelerate has prepared; it is changed in place.
        grid: place of this rank.

    Raises:
        ValueError: accelerate has divided the data in a way that cannot be changed.
    """
    for shard in (dataloader.batch_sampler, dataloader.dataset):
        if isinstance(shard, (BatchSamplerShard, IterableDatasetShard)) and shard.num_processes == grid.world_size:
            shard.num_processes, shard.process_index = grid.data, grid.data_index
            return
    raise ValueError(
        "zo_parallel: ranks cannot share batches of this train_dataset; use zo_parallel='data', a dataset with a "
        "length and Trainer's sampler, or for a streamed one accelerator_config={'dispatch_batches': False}."
    )


def _digest(sums: Tensor) -> Tensor:
    """Hash a list of numbers to 64 bits, int64 of shape (); sums: (n,), int64 on the CPU."""
    return torch.tensor(int.from_bytes(blake2b(sums.numpy().tobytes(), digest_size=8).digest(), "little", signed=True))


def _signed(bits: int) -> int:
    """Reinterpret 64 bits as a number that an int64 tensor can hold."""
    return bits - (1 << 64) if bits >> 63 else bits
