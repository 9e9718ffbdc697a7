"""What torch's optimizers do not have."""

from zo_hf.optimizers.normalisation import ScalarNormalisation
from zo_hf.optimizers.seeded_sgd import SeededSGD

__all__ = ["ScalarNormalisation", "SeededSGD"]
