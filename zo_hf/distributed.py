"""Several processes as one run: who evaluates what, what crosses the network, and whether all still agree.

A step is a few scalars. Every rank holds the whole model, evaluates its own probes on its own rows, and hands round the
losses; every rank then has all of them, averages them in the same order, and makes the same update.

Ranks form a grid of `data` × `directions`: neighbours share a batch and evaluate different directions of the step,

    rank = data_index · directions + direction_index        direction i belongs to direction_index = i mod directions
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from zo_hf.checksum import tensor_checksum
from zo_hf.probes.probe import Probe

PARALLEL = ("data", "directions", "both")

# A replica check reads every coordinate and one in so many of the other weights, others each time.
ROTATION = 8


class ReplicasDiffer(RuntimeError):
    """Ranks that should hold the same weights do not."""


class RankLost(RuntimeError):
    """A process of the run is gone."""


@dataclass(frozen=True)
class Grid:
    """One rank's place among the ranks of a run.

    Attributes:
        data: how many different batches a step has.
        directions: how many ranks share each of them.
        rank: this process's.
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
        """Which of the batches is this rank's."""
        return self.rank // self.directions

    @property
    def direction_index(self) -> int:
        """Which of the directions are this rank's: those equal to it modulo `directions`."""
        return self.rank % self.directions

    def own(self, probes: Sequence[Probe]) -> list[int]:
        """Positions of the probes that this rank evaluates."""
        return [i for i, probe in enumerate(probes) if probe.direction % self.directions == self.direction_index]

    def mean_losses(self, gathered: Tensor, probes: Sequence[Probe]) -> Tensor:
        """Losses at all probes, the mean over batches, from what every rank evaluated.

        gathered: (world_size, probes of the rank that has most)

        Returns:
            (len(probes),), the same bits on every rank: all add in the order of ranks.
        """
        mean = gathered.view(self.data, self.directions, -1).mean(0)
        losses = mean.new_empty(len(probes))
        for index in range(self.directions):
            own = Grid(self.data, self.directions, index).own(probes)
            losses[own] = mean[index, : len(own)]
        return losses


def make_grid(parallel: str, world_size: int, rank: int, num_directions: int) -> Grid:
    """The grid for `zo_parallel`.

    "data" gives every rank a batch of its own, "directions" gives all of them the same, and "both" shares a batch among
    as many ranks as divide both the ranks and the directions.

    Raises:
        ValueError: the directions cannot be shared out equally.
    """
    if parallel == "data":
        return Grid(world_size, 1, rank)
    if parallel == "both":
        directions = math.gcd(world_size, num_directions)
        return Grid(world_size // directions, directions, rank)
    if num_directions % world_size:
        raise ValueError(
            f"zo_parallel='directions' needs zo_num_directions={num_directions} to be a multiple of the {world_size} "
            "processes; change it, or use zo_parallel='both', which shares out what it can and splits the data for the rest."
        )
    return Grid(1, world_size, rank)


class Ranks:
    """The collectives of a run. Without torch.distributed, or alone, they do nothing and send nothing.

    Args:
        grid: this rank's place.

    Attributes:
        bytes_sent: payload that this rank has contributed to collectives so far.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        self.grid = grid if grid is not None else Grid()
        self.bytes_sent = 0

    def gather(self, tensor: Tensor) -> Tensor:
        """What every rank holds, (world_size, *tensor.shape)."""
        if self.grid.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.grid.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        self.count(tensor)
        return torch.stack(parts)

    def agree(self, vote: Tensor) -> bool:
        """Whether every rank says yes; vote: (), bool."""
        return bool(self.gather(vote).all())

    def take_from_first(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the first rank's."""
        if self.grid.world_size == 1:
            return
        held = tensor.detach().contiguous()
        dist.broadcast(held.view(-1).view(torch.uint8), 0)  # as bytes: not every backend knows every dtype
        self.count(held)
        if held.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(held)

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.grid.world_size > 1:
            # NCCL would otherwise guess which GPU is this process's.
            dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)

    def count(self, tensor: Tensor) -> None:
        """Add a tensor that was sent to `bytes_sent`."""
        self.bytes_sent += tensor.numel() * tensor.element_size()

    def mean_losses(self, losses: Tensor, probes: Sequence[Probe]) -> Tensor:
        """Losses at all probes from this rank's losses at its own; ranks with fewer of them pad with zeros."""
        most = max(len(replace(self.grid, rank=rank).own(probes)) for rank in range(self.grid.directions))
        padded = torch.nn.functional.pad(losses, (0, most - len(losses)))
        return self.grid.mean_losses(self.gather(padded), probes)

    def check_replicas(
        self, coordinates: Mapping[str, Tensor], weights: Mapping[str, Tensor], turn: int, step: int
    ) -> None:
        """Compare checksums of all coordinates and of one in `ROTATION` of the weights.

        Args:
            coordinates: by name.
            weights: by name; their names are the same on every rank.
            turn: counts the checks, so that each reads other weights.
            step: for the message.

        Raises:
            ReplicasDiffer: with the step, the ranks, and the first tensor that differs.
        """
        if self.grid.world_size == 1:
            return
        tensors = {f"the coordinates of {name}": tensor for name, tensor in coordinates.items()}
        tensors |= {
            name: tensor for i, (name, tensor) in enumerate(weights.items()) if i % ROTATION == turn % ROTATION
        }
        sums = torch.tensor([_signed(tensor_checksum(tensor)) for tensor in tensors.values()])
        device = next(iter(coordinates.values())).device
        if len(set(self.gather(_digest(sums).to(device)).tolist())) == 1:
            return
        everyones = self.gather(sums.to(device)).cpu()  # (world_size, tensors)
        first = int((everyones != everyones[0]).any(0).nonzero()[0])
        name = list(tensors)[first]
        usual = Counter(everyones[:, first].tolist()).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(everyones[:, first].tolist()) if value != usual]
        raise ReplicasDiffer(
            f"at step {step} rank {', '.join(map(str, odd))} of {self.grid.world_size} holds other weights than the rest, "
            f"first in {name}; resume from the last checkpoint, and look for hardware errors or code that changes weights "
            "on one rank alone."
        )

    def check_shared_batch(self, inputs: object, device: torch.device) -> None:
        """Make sure that the ranks which should share a batch do.

        Args:
            inputs: tensors in dicts, lists and tuples.
            device: where the ranks can talk.

        Raises:
            ReplicasDiffer: they were handed different ones.
        """
        if self.grid.directions == 1:
            return
        sums = [_signed(tensor_checksum(leaf)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        everyones = self.gather(_digest(torch.tensor(sums)).to(device)).view(self.grid.data, self.grid.directions)
        if not bool((everyones == everyones[:, :1]).all()):
            raise ReplicasDiffer(
                "zo_parallel: ranks that evaluate different directions were handed different batches; make the training "
                "data and their order the same on every rank."
            )


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Says in one sentence what it means when a collective fails because another process is gone.

    Raises:
        RankLost: a process died, or did not answer in the time that `ddp_timeout` gives it.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, which begins with the path of the source file that it comes from.
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise RankLost(
            "another process of this run has stopped or does not answer; see what it said last, and start again with "
            "resume_from_checkpoint=True, on any number of processes that keeps the batch size."
        ) from error


def share_batches(dataloader: DataLoader, grid: Grid) -> None:
    """Give the ranks of a row of the grid the same batches, where accelerate gave each rank its own.

    Raises:
        ValueError: the data was shared out in a way that cannot be changed.
    """
    for shard in (dataloader.batch_sampler, dataloader.dataset):
        if isinstance(shard, (BatchSamplerShard, IterableDatasetShard)) and shard.num_processes == grid.world_size:
            shard.num_processes, shard.process_index = grid.data, grid.data_index
            return
    raise ValueError(
        "zo_parallel: ranks cannot be given the same batches of this train_dataset; use zo_parallel='data', or a dataset "
        "with a length and Trainer's usual sampler (of a streamed one, dispatch_batches=False in accelerator_config)."
    )


def _digest(sums: Tensor) -> Tensor:
    """64 bits that stand for a list of numbers; sums: (n,), int64 on the CPU."""
    return torch.tensor(int.from_bytes(blake2b(sums.numpy().tobytes(), digest_size=8).digest(), "little", signed=True))


def _signed(bits: int) -> int:
    """The same 64 bits as a number that an int64 tensor holds."""
    return bits - (1 << 64) if bits >> 63 else bits
