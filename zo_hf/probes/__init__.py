"""Evaluating the loss around the current point."""

from zo_hf.probes.probe import NotBatchable, Probe

__all__ = ["NotBatchable", "Probe"]
