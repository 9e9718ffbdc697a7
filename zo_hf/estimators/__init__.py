"""Turning the losses of a step's probes into projected gradients."""

from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.second_difference import SecondDifference
from zo_hf.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, type[Estimator]] = {kind.name: kind for kind in (TwoPoint, SecondDifference)}

__all__ = ["ESTIMATORS", "Estimator", "SecondDifference", "TwoPoint"]
