"""The trainers of TRL that are ready-made, and why others are not: one table each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


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

_MADE: dict[str, tuple[Any, Any]] = {}


def pair_of(name: str) -> tuple[Any, Any]:
    """Make a trainer of TRL and its config forward-only, once.

    Args:
        name: a name of `READY`.

    Returns:
        The classes `ZO<name>Trainer` and `ZO<name>Config`.

    Raises:
        ImportError: TRL is not installed, or has no such trainer.
    """
    if name not in _MADE:
        _MADE[name] = _made(name, READY[name])
    return _MADE[name]


def _made(name: str, ready: Ready) -> tuple[Any, Any]:
    try:
        module = importlib.import_module(ready.module)
        trainer, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"ZO{name}Trainer needs {ready.module}.{name}Trainer, which did not import ({error}); "
            "pip install 'zo_hf[trl]' installs TRL, for Python 3.11 and later."
        ) from error
    # Imported here, because the names of this package need neither torch nor transformers.
    from zo_hf.trainer.forward_only import forward_only
    from zo_hf.trl.by_rows import ByRows

    if ready.by_rows:
        trainer = type(trainer.__name__, (ByRows, trainer), {"has_pairs": ready.has_pairs, "__module__": __name__})
    return forward_only(trainer, config)
