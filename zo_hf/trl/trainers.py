"""The trainers of TRL that train forward-only, and why others do not: one table each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """A trainer of TRL that trains forward-only.

    Args:
        module: the module of TRL that has the trainer and its config.
        by_rows: True if its loss comes apart by rows or pairs.
        has_pairs: True if a batch has all chosen and then all rejected sequences.
    """

    module: str = "trl"
    by_rows: bool = False
    has_pairs: bool = False


#: By the name before `Trainer` and `Config`. Where a comment says why, rows depend on each other.
READY = {
    "SFT": Ready(by_rows=True),
    "DPO": Ready(by_rows=True, has_pairs=True),
    "Reward": Ready(by_rows=True, has_pairs=True),
    "KTO": Ready(),  # the estimate of the KL divergence is that of the batch
    "CPO": Ready("trl.experimental.cpo"),  # its cross entropy is a mean over the tokens of the batch
    "ORPO": Ready("trl.experimental.orpo"),  # so is this one's
    "TPO": Ready("trl.experimental.tpo"),  # and this one's
}

_REWARDS = "samples completions and takes a gradient through their rewards; use zo_hf.rewards.EvolutionTrainer, which needs none"
_SAMPLES = "trains on completions that it samples; sample them first, and train on them with ZOSFTTrainer"

#: Trainers that generate, with the reason and the way out.
REFUSED = {
    **dict.fromkeys(("GRPO", "RLOO", "OnlineDPO", "A2PO", "AsyncGRPO", "GMPO"), _REWARDS),
    **dict.fromkeys(
        ("Distillation", "AsyncDistillation", "ServerDistillation", "GKD", "GOLD", "IWOPD", "SDFT", "SDPO"), _SAMPLES
    ),
}


def kinds_of(trainer: type) -> list[str]:
    """Return the names before `Trainer` of the classes of TRL that a class is or inherits from, the nearest first."""
    from zo_hf.trainer.objectives import kinds_of_trl  # not at the top: the package is imported without torch

    return [name.removesuffix("Trainer") for name in kinds_of_trl(trainer)]
