"""What torch's optimizers do not have."""

from zo_hf.optimizers.cocd import CoherentCoordinateDescent
from zo_hf.optimizers.normalisation import ScalarNormalisation
from zo_hf.optimizers.rule import Rule
from zo_hf.optimizers.seeded_sgd import SeededSGD

RULES: dict[str, type[Rule]] = {kind.name: kind for kind in (Rule, CoherentCoordinateDescent)}

__all__ = ["RULES", "CoherentCoordinateDescent", "Rule", "ScalarNormalisation", "SeededSGD"]
