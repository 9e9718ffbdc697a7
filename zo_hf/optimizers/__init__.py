"""What torch's optimizers do not have."""

from zo_hf.optimizers.cocd import CoherentCoordinateDescent
from zo_hf.optimizers.conservative import Conservative
from zo_hf.optimizers.curvature import Curvature
from zo_hf.optimizers.muon import Muon
from zo_hf.optimizers.normalisation import ScalarNormalisation
from zo_hf.optimizers.power_iteration import PowerIteration
from zo_hf.optimizers.rule import Rule, RuleOptions
from zo_hf.optimizers.seeded_sgd import SeededSGD
from zo_hf.optimizers.sign import Sign
from zo_hf.optimizers.svrg import SVRG

RULES: dict[str, type[Rule]] = {
    kind.name: kind
    for kind in (Rule, Sign, Conservative, Curvature, Muon, PowerIteration, CoherentCoordinateDescent, SVRG)
}

__all__ = ["RULES", "CoherentCoordinateDescent", "Rule", "RuleOptions", "ScalarNormalisation", "SeededSGD"]
