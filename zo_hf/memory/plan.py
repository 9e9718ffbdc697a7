"""The memory plan: the peak memory of every training setup, compared with the memory of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.utils import is_peft_available

from zo_hf.memory.assumptions import Assumptions
from zo_hf.memory.model import check_config
from zo_hf.memory.setups import SETUPS, Footprint, Setup, footprints
from zo_hf.memory.size import parse_size


@dataclass(frozen=True)
class Row:
    """The memory of one setup for running or training the model; sizes are in bytes.

    Args:
        setup: the method and the format of the weights.
        base: the name of that format; the name of the dtype for half precision.
        moves: number of coordinates, or of trained weights.
        weights: the model's weights, including an adapter.
        state: memory kept from step to step: coordinates, directions, gradients, optimizer.
        working: memory beyond that at the peak of a step: activations, logits, scratch.
        overhead: assumed size of the CUDA context and the allocator's overhead.
        headroom: GPU memory that is left; negative if the setup does not fit.
        passes: rows of each forward pass of a step.
        crosses: weights that are copied to the GPU in a step, from where they are kept.
    """

    setup: Setup
    base: str
    moves: int
    weights: int
    state: int
    working: int
    overhead: int
    headroom: int
    passes: tuple[int, ...]
    crosses: int = 0

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        return self.weights + self.state + self.working + self.overhead

    @property
    def fits(self) -> bool:
        """True if the setup fits in the GPU's memory."""
        return self.headroom >= 0


@dataclass(frozen=True)
class Plan:
    """The result of planning.

    Args:
        model: the config's model type.
        gpu_memory: memory of the GPU in bytes.
        assumptions: the assumed run.
        rows: one row for every setup.
        notes: setups that were left out, and why.
    """

    model: str
    gpu_memory: int
    assumptions: Assumptions
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def row(self, kind: str, base: str = "half", checkpointing: bool = False, streamed: bool = False) -> Row:
        """Return the row of one setup, named as in `zo_hf.memory.setups.SETUPS`."""
        return next(row for row in self.rows if row.setup == Setup(kind, base, checkpointing, streamed))


def plan(
    config: PretrainedConfig,
    gpu_memory: int | str,
    assumptions: Assumptions | None = None,
    setups: Sequence[Setup] = SETUPS,
) -> Plan:
    """Compute the peak memory of every training setup of a model, from its config alone.

    Args:
        config: the config of a causal language model.
        gpu_memory: bytes, or a size such as "24GB" or "16GiB".
        assumptions: the assumed run; default: `Assumptions()`.
        setups: the setups to plan, in the order of the rows.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    given = assumptions or Assumptions()
    available = parse_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    if available < 1:
        raise ValueError(f"gpu_memory={available} must be at least 1 byte; give a size such as 24GB.")
    check_config(config)
    notes = []
    if not is_peft_available():
        setups = [setup for setup in setups if not setup.uses_adapter]
        notes.append("adapters are left out: peft is not installed (pip install zo_hf[peft])")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and given.sequence_length > longest:
        raise ValueError(
            f"sequence_length={given.sequence_length} exceeds the model's {longest} positions; use at most {longest}."
        )
    by_setup = footprints(config, given, setups)
    rows = tuple(_row(setup, by_setup[setup], given, available) for setup in setups)
    return Plan(config.model_type, available, given, rows, tuple(notes))


def _row(setup: Setup, footprint: Footprint, given: Assumptions, available: int) -> Row:
    total = footprint.weights + footprint.state + footprint.working + given.overhead
    return Row(
        setup,
        given.dtype if setup.base == "half" else setup.base,
        footprint.moves,
        footprint.weights,
        footprint.state,
        footprint.working,
        given.overhead,
        available - total,
        footprint.passes,
        footprint.crosses,
    )
