"""What a plan takes for granted about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_hf.directions import ELEMENTWISE

HALF_DTYPES = ("bfloat16", "float16")
# Copies of the coordinates that an optimizer keeps between its steps.
OPTIMIZER_COPIES = {"sgd": 0, "momentum": 1, "adamw": 2}
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Assumptions:
    """The run that is planned.

    Args:
        batch_size: rows in a batch.
        sequence_length: tokens in a row.
        dtype: of the weights in half precision and of what quantised weights are computed in.
        labels: positions of a row that carry a label, the last ones; None means all.
        padded: rows have different lengths, so that a mask is made.
        attention: attention implementation, "sdpa" (never holds the scores) or "eager" (holds them).
        rank: of the low-rank factors.
        num_directions: q; a step evaluates 2q probes, those of the two-point estimator.
        batched: all probes in one forward pass, which holds 2q times the activations, or one after another.
        direction: distribution of the directions.
        optimizer: of the coordinates or adapter weights, "sgd", "momentum" or "adamw".
        lora_rank: rank of the LoRA adapter.
        lora_targets: names of the modules that get one; () takes PEFT's choice for the model, or all linear layers.
        overhead: bytes that the CUDA context, libraries' workspaces and the allocator take.

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
    batched: bool = True
    direction: str = "gaussian"
    optimizer: str = "sgd"
    lora_rank: int = 8
    lora_targets: Sequence[str] = ()
    overhead: int = 10**9

    def __post_init__(self) -> None:
        for name in ("batch_size", "rank", "num_directions", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2: a token predicts the next.")
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
    def probes(self) -> int:
        """Evaluations of the loss in a step."""
        return 2 * self.num_directions
