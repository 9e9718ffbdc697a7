"""Fine-tune language models with forward passes only: a Hugging Face `Trainer` whose backward pass is gone."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["ZOConfig", "ZOSeq2SeqTrainer", "ZOTrainer", "ZOTrainerMixin", "ZerothOrder"]

if TYPE_CHECKING:
    from zo_hf.config import ZOConfig
    from zo_hf.trainer import ZOSeq2SeqTrainer, ZOTrainer, ZOTrainerMixin
    from zo_hf.zeroth_order import ZerothOrder

_HOME = {
    "ZOConfig": "zo_hf.config",
    "ZOTrainer": "zo_hf.trainer",
    "ZOSeq2SeqTrainer": "zo_hf.trainer",
    "ZOTrainerMixin": "zo_hf.trainer",
    "ZerothOrder": "zo_hf.zeroth_order",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line's --help and the version need neither torch nor transformers.
    if name not in _HOME:
        raise AttributeError(f"module 'zo_hf' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
