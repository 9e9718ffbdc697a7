"""Fine-tune language models with forward passes only: the Hugging Face `Trainer` without a backward pass."""

from typing import TYPE_CHECKING, Any

from zo_hf.version import __version__

__all__ = [
    "FittedHead",
    "RowLosses",
    "ZOConfig",
    "ZOSeq2SeqTrainer",
    "ZOTrainer",
    "ZerothOrder",
    "__version__",
    "fit_head",
    "forward_only",
]

if TYPE_CHECKING:
    from zo_hf.engine import ZerothOrder
    from zo_hf.evaluation.row_losses import RowLosses
    from zo_hf.heads.fit import FittedHead, fit_head
    from zo_hf.trainer.config import ZOConfig
    from zo_hf.trainer.seq2seq import ZOSeq2SeqTrainer
    from zo_hf.trainer.trainer import ZOTrainer
    from zo_hf.trl.forward_only import forward_only

_HOME = {
    "FittedHead": "zo_hf.heads.fit",
    "RowLosses": "zo_hf.evaluation.row_losses",
    "ZOConfig": "zo_hf.trainer.config",
    "ZOTrainer": "zo_hf.trainer.trainer",
    "ZOSeq2SeqTrainer": "zo_hf.trainer.seq2seq",
    "ZerothOrder": "zo_hf.engine",
    "fit_head": "zo_hf.heads.fit",
    "forward_only": "zo_hf.trl.forward_only",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line's --help and the version need neither torch nor transformers.
    import importlib

    if name == "ZOTrainerMixin":
        import warnings

        warnings.warn(
            "ZOTrainerMixin is deprecated; make a forward-only class with zo_hf.forward_only(TrainerClass, ConfigClass).",
            FutureWarning,
            stacklevel=2,
        )
        return importlib.import_module("zo_hf.trainer.trainer").ZOTrainer
    if name not in _HOME:
        raise AttributeError(f"module 'zo_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
