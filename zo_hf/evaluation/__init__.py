"""Evaluation of the loss around the current point."""

from zo_hf.estimators.probe import NotBatchable, Probe

__all__ = ["NotBatchable", "Probe"]
