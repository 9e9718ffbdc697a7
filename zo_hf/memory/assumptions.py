"""The assumptions of a memory plan about the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_hf.directions import ELEMENTWISE
from zo_hf.evaluation.rows import groups_of

HALF_DTYPES = ("bfloat16", "float16")
# Number of copies of the coordinates that an optimizer keeps from step to step.
OPTIMIZER_COPIES = {"sgd": 0, "momentum": 1, "adamw": 2}
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Assumptions:
    """The run that a plan describes.

    Args:
        batch_size: rows in a batch.
        sequence_length: tokens in a row.
        dtype: dtype of half-precision weights, and of computations with quantized weights.
        labels: number of positions at the end of a row that carry a label; None means all positions.
        padded: True if rows have different lengths, which requires an attention mask.
        attention: attention implementation, "sdpa" (never stores the scores) or "eager" (stores them).
        rank: rank of the low-rank factors.
        num_directions: q; a step of the two-point estimator evaluates 2q probes.
        rows_per_direction: rows of a group with directions of its own, which a step holds for all groups; 0 for one group
            of all rows, and "auto" for what the Trainer chooses by default.
        batched: True for all probes in one forward pass, which holds 2q times the activations; False for one after another.
            "auto" is the least that a run needs: one after another if groups of rows have directions of their own, else
            in one pass. If the GPU has memory left, such a run takes one pass. A run on a CPU always does, so plan True
            for it, or set `zo_batched_probes=False`.
        direction: distribution of the directions.
        optimizer: optimizer of the coordinates or adapter weights, "sgd", "momentum" or "adamw".
        lora_rank: rank of the LoRA adapter.
        lora_targets: names of the modules with an adapter; () takes PEFT's choice for the model, or all linear layers.
        overhead: bytes for the CUDA context, workspaces of libraries and the allocator.

    Raises:
        ValueError: a value is not usable; the message names it.
    """

    batch_size: int = 8
    sequence_length: int = 512
    dtype: str = "bfloat16"
    labels: int | None = 1
    padded: bool = True
    attention: str = "sdpa"
    rank: int = 4
    num_directions: int = 1
    rows_per_direction: int | str = "auto"
    batched: bool | str = "auto"
    direction: str = "gaussian"
    optimizer: str = "sgd"
    lora_rank: int = 8
    lora_targets: Sequence[str] = ()
    overhead: int = 10**9

    def __post_init__(self) -> None:
        for name in ("batch_size", "rank", "num_directions", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        rows = self.rows_per_direction
        if rows != "auto" and (isinstance(rows, str) or rows < 0):
            raise ValueError(f"rows_per_direction={rows!r} must be a number of rows, or 'auto'.")
        if self.batched not in (True, False, "auto"):
            raise ValueError(f"batched={self.batched!r} must be True, False or 'auto'.")
        if self.sequence_length < 2:
            raise ValueError(
                f"sequence_length={self.sequence_length} must be at least 2, because a token predicts the next."
            )
        if self.labels is not None and not 1 <= self.labels < self.sequence_length:
            raise ValueError(
                f"labels={self.labels} must be at least 1 and below sequence_length={self.sequence_length}; "
                "use 'all' for a label at every position."
            )
        if self.overhead < 0:
            raise ValueError(f"overhead={self.overhead} must not be negative; use 0 to leave it out.")
        choices = (
            ("dtype", HALF_DTYPES),
            ("attention", ATTENTION),
            ("direction", ELEMENTWISE),
            ("optimizer", OPTIMIZER_COPIES),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}.")

    @property
    def groups(self) -> int:
        """The number of groups of rows in a step."""
        return groups_of(self.batch_size, self.rows_per_direction)

    @property
    def probes(self) -> int:
        """The number of loss evaluations in a step."""
        return 2 * self.num_directions
