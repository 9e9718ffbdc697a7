"""A classification head in closed form, from forward passes."""

from zo_hf.heads.fit import FittedHead, fit_head

__all__ = ["FittedHead", "fit_head"]
