"""Several processes as one run: the grid of ranks, their collectives, and the check that all ranks still agree.

Every rank holds the whole model, evaluates its own probes on its own rows, and shares the losses with all others. Only
these few scalars cross the network. All ranks then average the losses in the same order and make the same update.

Ranks form a grid of `data` × `directions`: neighbors share a batch and evaluate different directions of the step,

    rank = data_index · directions + direction_index        direction i belongs to direction_index = i mod directions

In a pipeline each place of this grid is taken by `stages` neighbors, which hold the model's layers one after another:

    rank = (data_index · directions + direction_index) · stages + stage        the last stage has the losses
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from zo_hf.estimators.probe import Probe
from zo_hf.parallel.absent import is_absent
from zo_hf.parallel.checksum import tensor_checksum

PARALLEL = ("data", "directions", "both", "pipeline")

# A replica check reads all coordinates and one in ROTATION of the other weights, different ones at each check.
ROTATION = 8

# Stands in a table of checksums for a weight that another stage holds.
_ABSENT = 0


class ReplicasDiffer(RuntimeError):
    """Raised if ranks that should have the same weights, arguments or batch do not."""


@dataclass(frozen=True)
class Grid:
    """The place of one rank in the grid of a run.

    Attributes:
        data: number of different batches in a step.
        directions: number of ranks, or pipelines, that evaluate a batch along directions of their own.
        rank: number of this process, from 0.
        stages: number of ranks of a pipeline; 1 without pipelines.
    """

    data: int = 1
    directions: int = 1
    rank: int = 0
    stages: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.sharing

    @property
    def sharing(self) -> int:
        """Number of ranks that get the same batch."""
        return self.directions * self.stages

    @property
    def data_index(self) -> int:
        """Index of the batch that this rank evaluates."""
        return self.rank // self.sharing

    @property
    def direction_index(self) -> int:
        """Index of this rank in its row. The rank evaluates the directions that equal it modulo `directions`."""
        return self.rank // self.stages % self.directions

    @property
    def stage(self) -> int:
        """Index of this rank in its pipeline."""
        return self.rank % self.stages

    def own(self, probes: Sequence[Probe], index: int | None = None) -> list[int]:
        """Return the positions of the probes that this rank, or the ranks of another direction index, evaluate."""
        index = self.direction_index if index is None else index
        return [i for i, probe in enumerate(probes) if probe.direction % self.directions == index]

    def mean_losses(self, gathered: Tensor, probes: Sequence[Probe]) -> Tensor:
        """Average the losses of all ranks over the batches.

        Args:
            gathered: losses of every rank at its own probes, (world_size, largest number of own probes).
            probes: all probes of the step.

        Returns:
            (len(probes),), the same bits on every rank, because all of them add in the order of the ranks.
        """
        mean = self.of_last_stages(gathered).view(self.data, self.directions, -1).mean(0)
        losses = mean.new_empty(len(probes))
        for index in range(self.directions):
            own = self.own(probes, index)
            losses[own] = mean[index, : len(own)]
        return losses

    def of_last_stages(self, gathered: Tensor) -> Tensor:
        """Return what the last rank of every pipeline holds, (data · directions, ...), of what all ranks hold."""
        return gathered[self.stages - 1 :: self.stages]


def make_grid(parallel: str, world_size: int, rank: int, num_directions: int, stages: int | str = "auto") -> Grid:
    """Build the grid for `zo_parallel`.

    "data" gives every rank a batch of its own. "directions" gives all ranks the same batch. "both" shares a batch
    among as many ranks as possible: the largest number that divides both the ranks and the directions. "pipeline" is "data"
    with pipelines in place of ranks.

    Args:
        parallel: one of `PARALLEL`.
        world_size: number of ranks.
        rank: number of this process.
        num_directions: q, number of directions of a step.
        stages: number of ranks of a pipeline. "auto" stands for all of them with "pipeline", and otherwise for 1.

    Raises:
        ValueError: the ranks cannot be divided equally into pipelines, or "directions" cannot divide the directions equally.
    """
    if stages == "auto":
        stages = world_size if parallel == "pipeline" else 1
    stages = int(stages)
    if world_size % stages:
        raise ValueError(
            f"zo_pipeline_stages={stages} cannot divide {world_size} processes into equal pipelines; start a multiple of it."
        )
    pipelines = world_size // stages
    if parallel in ("data", "pipeline"):
        return Grid(pipelines, 1, rank, stages)
    if parallel == "both":
        directions = math.gcd(pipelines, num_directions)
        return Grid(pipelines // directions, directions, rank, stages)
    if num_directions % pipelines:
        raise ValueError(
            f"zo_parallel='directions' cannot divide zo_num_directions={num_directions} equally among {pipelines} "
            f"{'processes' if stages == 1 else 'pipelines'}; use a multiple, or zo_parallel='both', which also divides the data."
        )
    return Grid(1, pipelines, rank, stages)


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
        most = max(len(self.grid.own(probes, index)) for index in range(self.grid.directions))
        padded = losses if len(losses) == most else torch.nn.functional.pad(losses, (0, most - len(losses)))
        # To the host, which reads them next, in one transfer that it waits for.
        return self.grid.mean_losses(self.all_gather(padded).cpu(), probes)

    def check_replicas(
        self, coordinates: Mapping[str, Tensor], weights: Mapping[str, Tensor], turn: int | None, step: int
    ) -> None:
        """Compare the checksums of all coordinates, and of one in `ROTATION` of the weights or of all, between ranks.

        Weights that other stages of a pipeline hold are compared among those.

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
        held = [None if is_absent(tensor) else _signed(tensor_checksum(tensor)) for tensor in tensors.values()]
        sums = torch.tensor([_ABSENT if value is None else value for value in held])
        device = next(iter(tensors.values())).device
        # Stages hold other weights than each other, so that one number for all of them would tell nothing.
        if self.grid.stages == 1 and len(set(self.all_gather(_digest(sums).to(device)).tolist())) == 1:
            return
        all_sums = self.all_gather(sums.to(device)).cpu().T.tolist()  # (tensors, world_size)
        differ = (i for i, values in enumerate(all_sums) if len({value for value in values if value != _ABSENT}) > 1)
        first = next(differ, None)
        if first is None:
            return
        name = list(tensors)[first]
        values = {rank: value for rank, value in enumerate(all_sums[first]) if value != _ABSENT}
        usual = Counter(values.values()).most_common(1)[0][0]
        odd = [rank for rank, value in values.items() if value != usual]
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
        if self.grid.sharing == 1:
            return
        sums = [_signed(tensor_checksum(leaf)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        all_sums = self.all_gather(_digest(torch.tensor(sums)).to(device)).view(self.grid.data, self.grid.sharing)
        if not bool((all_sums == all_sums[:, :1]).all()):
            raise ReplicasDiffer(
                "zo_parallel: ranks that should share a batch were given different batches; make the training data "
                "and its order the same on every rank."
            )


def share_batches(dataloader: DataLoader, grid: Grid, sharing: int) -> None:
    """Give neighbors among the ranks the same batches, although accelerate gave each rank its own.

    Args:
        dataloader: dataloader that accelerate has prepared; it is changed in place.
        grid: place of this rank.
        sharing: number of neighbors that share batches: those in one row of the grid, or of one pipeline.

    Raises:
        ValueError: accelerate has divided the data in a way that cannot be changed.
    """
    place = grid.world_size // sharing, grid.rank // sharing
    for shard in (dataloader.batch_sampler, dataloader.dataset):
        if not isinstance(shard, (BatchSamplerShard, IterableDatasetShard)):
            continue
        # Trainer keeps a dataloader with persistent workers, whose place is this one already.
        if shard.num_processes == grid.world_size or (shard.num_processes, shard.process_index) == place:
            shard.num_processes, shard.process_index = place
            return
    raise ValueError(
        "zo_parallel: ranks cannot share batches of this dataset; use zo_parallel='data', a dataset with a "
        "length and Trainer's sampler, or for a streamed one accelerator_config={'dispatch_batches': False}."
    )


def _digest(sums: Tensor) -> Tensor:
    """Hash a list of numbers to 64 bits, int64 of shape (); sums: (n,), int64 on the CPU."""
    return torch.tensor(int.from_bytes(blake2b(sums.numpy().tobytes(), digest_size=8).digest(), "little", signed=True))


def _signed(bits: int) -> int:
    """Reinterpret 64 bits as a number that an int64 tensor can hold."""
    return bits - (1 << 64) if bits >> 63 else bits
