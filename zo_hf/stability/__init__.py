"""Stability of zeroth-order descent: critical step sizes, and the growth of second moments at any step size."""

from zo_hf.stability.critical import cocd_critical_step_size, critical_step_size, is_stable, step_size_bounds
from zo_hf.stability.moments import Moments, moment_growth, next_moments
from zo_hf.stability.preconditioned import critical_step_size_of_hessian

__all__ = [
    "Moments",
    "cocd_critical_step_size",
    "critical_step_size",
    "critical_step_size_of_hessian",
    "is_stable",
    "moment_growth",
    "next_moments",
    "step_size_bounds",
]
