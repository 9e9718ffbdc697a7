"""Update rules that torch's optimizers do not have."""

from zo_hf.rules.cocd import CoherentCoordinateDescent
from zo_hf.rules.conservative import Conservative
from zo_hf.rules.hizoo import Curvature
from zo_hf.rules.muon import Muon
from zo_hf.rules.normalization import ScalarNormalization
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.power_iteration import PowerIteration
from zo_hf.rules.rule import Rule
from zo_hf.rules.seeded_sgd import SeededSGD
from zo_hf.rules.sign import Sign
from zo_hf.rules.svrg import SVRG

RULES: dict[str, type[Rule]] = {
    kind.name: kind
    for kind in (Rule, Sign, Conservative, Curvature, Muon, PowerIteration, CoherentCoordinateDescent, SVRG)
}

__all__ = ["RULES", "CoherentCoordinateDescent", "Rule", "RuleOptions", "ScalarNormalization", "SeededSGD", "Sign"]
