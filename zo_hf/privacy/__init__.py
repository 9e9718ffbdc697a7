"""Differential privacy of the numbers that a step keeps: their bound, their noise, and the account of what they reveal."""

from zo_hf.privacy.accounting import Guarantee
from zo_hf.privacy.mechanism import GaussianMechanism
from zo_hf.privacy.secret import Secret

__all__ = ["GaussianMechanism", "Guarantee", "Secret"]
