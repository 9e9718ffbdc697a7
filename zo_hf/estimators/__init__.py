"""Estimators, which turn the losses of a step's probes into projected gradients; one file each."""

from zo_hf.estimators.coordinate import Coordinate, CoordinateForward
from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.evolution import Evolution, EvolutionRanks
from zo_hf.estimators.forward_gradient import ForwardGradient
from zo_hf.estimators.fzoo import FZOO
from zo_hf.estimators.one_sided import OneSided
from zo_hf.estimators.second_difference import SecondDifference
from zo_hf.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, type[Estimator]] = {
    kind.name: kind
    for kind in (
        TwoPoint,
        SecondDifference,
        OneSided,
        FZOO,
        Evolution,
        EvolutionRanks,
        ForwardGradient,
        Coordinate,
        CoordinateForward,
    )
}

__all__ = [
    "ESTIMATORS",
    "FZOO",
    "Coordinate",
    "CoordinateForward",
    "Estimator",
    "Evolution",
    "EvolutionRanks",
    "ForwardGradient",
    "OneSided",
    "SecondDifference",
    "TwoPoint",
]
