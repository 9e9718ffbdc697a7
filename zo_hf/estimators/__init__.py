"""Turning the losses of a step's probes into projected gradients."""

from zo_hf.estimators.two_point import TwoPoint

ESTIMATORS = {kind.name: kind for kind in (TwoPoint,)}

__all__ = ["ESTIMATORS", "TwoPoint"]
