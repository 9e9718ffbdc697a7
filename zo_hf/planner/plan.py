"""The plan: every way's peak memory beside the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.utils import is_peft_available

from zo_hf.planner.assumptions import Assumptions
from zo_hf.planner.model import check_config
from zo_hf.planner.size import parse_size
from zo_hf.planner.ways import WAYS, Footprint, Way, footprints


@dataclass(frozen=True)
class Row:
    """One way of running or training the model; sizes are in bytes.

    Args:
        way: what runs, on which format of the weights.
        base: that format, with the dtype's name.
        moves: number of coordinates, or of trained weights.
        weights: of the model, an adapter's included.
        state: what stays from step to step: coordinates, directions, gradients, optimizer.
        working: what the peak of a step has beyond that: activations, logits, scratch.
        overhead: assumed for the CUDA context and the allocator.
        headroom: memory left; negative if it does not fit.
    """

    way: Way
    base: str
    moves: int
    weights: int
    state: int
    working: int
    overhead: int
    headroom: int

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        return self.weights + self.state + self.working + self.overhead

    @property
    def fits(self) -> bool:
        """Whether it is at most the GPU's memory."""
        return self.headroom >= 0


@dataclass(frozen=True)
class Plan:
    """What fits.

    Args:
        model: the config's model type.
        gpu_memory: bytes.
        assumptions: the run.
        rows: one for every way.
        notes: what was left out, and why.
    """

    model: str
    gpu_memory: int
    assumptions: Assumptions
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def row(self, kind: str, base: str = "half", checkpointing: bool = False) -> Row:
        """The row of one way, named as in `zo_hf.planner.ways.WAYS`."""
        return next(row for row in self.rows if row.way == Way(kind, base, checkpointing))


def plan(
    config: PretrainedConfig,
    gpu_memory: int | str,
    assumptions: Assumptions | None = None,
    ways: Sequence[Way] = WAYS,
) -> Plan:
    """Peak memory of every way to train a model, without its weights.

    Args:
        config: of a causal language model.
        gpu_memory: bytes, or a size such as "24GB" or "16GiB".
        assumptions: the run; default: `Assumptions()`.
        ways: which rows.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    given = assumptions or Assumptions()
    available = parse_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    if available < 1:
        raise ValueError(f"gpu_memory={available} must be at least 1 byte; write it as 24GB.")
    check_config(config)
    notes = []
    if not is_peft_available():
        ways = [way for way in ways if not way.uses_adapter]
        notes.append("adapters are left out: peft is not installed (pip install zo_hf[peft])")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and given.sequence_length > longest:
        raise ValueError(
            f"sequence_length={given.sequence_length} is more than the model's {longest} positions; use at most that."
        )
    found = footprints(config, given, ways)
    rows = tuple(_row(way, found[way], given, available) for way in ways)
    return Plan(config.model_type, available, given, rows, tuple(notes))


def _row(way: Way, footprint: Footprint, given: Assumptions, available: int) -> Row:
    total = footprint.weights + footprint.state + footprint.working + given.overhead
    return Row(
        way,
        given.dtype if way.base == "half" else way.base,
        footprint.moves,
        footprint.weights,
        footprint.state,
        footprint.working,
        given.overhead,
        available - total,
    )
