"""What every method says about itself: the rows of `zo-hf methods`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One entry of a registry, as a user compares it with others.

    Args:
        paper: where it comes from, with the arXiv number where there is one.
        forwards: forward passes of a step, in terms of q (`zo_num_directions`); "" where it does not change them.
        memory: numbers held beyond the weights, in terms of d (coordinates); "0" holds none.
        needs: what it cannot do without; "" needs nothing.
    """

    paper: str
    forwards: str = ""
    memory: str = "0"
    needs: str = ""
