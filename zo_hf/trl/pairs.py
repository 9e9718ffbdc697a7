"""The ready-made pairs of a trainer and its config."""

from __future__ import annotations

import importlib
from typing import Any

from zo_hf.trl.trainers import READY


def pair_of(name: str) -> tuple[Any, Any]:
    """Make a trainer of TRL and its config forward-only, once.

    Args:
        name: a name of `READY`.

    Returns:
        The classes `ZO<name>Trainer` and `ZO<name>Config`.

    Raises:
        ImportError: TRL is not installed, or has no such trainer.
    """
    home = READY[name].module
    try:
        module = importlib.import_module(home)
        trainer, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"ZO{name}Trainer needs {home}.{name}Trainer, which did not import ({error}); "
            "pip install 'zo_hf[trl]' installs TRL, for Python 3.11 and later."
        ) from error
    # Imported here, because the names of this package need neither torch nor transformers.
    from zo_hf.trl.forward_only import forward_only

    return forward_only(trainer, config)
