"""TRL's trainers, forward-only and ready-made: `from zo_hf.trl import ZOSFTTrainer, ZOSFTConfig`.

A pair is made on its first import, and TRL is imported then.
"""

from typing import Any

from zo_hf.trl.pairs import pair_of
from zo_hf.trl.trainers import READY, REFUSED

_KINDS = ("Trainer", "Config")

__all__ = [f"ZO{name}{kind}" for name in READY for kind in _KINDS]


def __getattr__(name: str) -> Any:
    of, kind = next(((name[2 : -len(kind)], kind) for kind in _KINDS if name.endswith(kind)), ("", ""))
    if name.startswith("ZO") and of in READY:
        return pair_of(of)[_KINDS.index(kind)]
    if name.startswith("ZO") and of in REFUSED:
        raise ImportError(f"zo_hf.trl has no {name}: TRL's {of}Trainer {REFUSED[of]}.")
    raise AttributeError(f"module 'zo_hf.trl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
