"""Turning the losses of a step's probes into projected gradients."""

from zo_hf.estimators.coordinate import Coordinate, CoordinateForward
from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, type[Estimator]] = {kind.name: kind for kind in (TwoPoint, Coordinate, CoordinateForward)}

__all__ = ["ESTIMATORS", "Coordinate", "CoordinateForward", "Estimator", "TwoPoint"]
