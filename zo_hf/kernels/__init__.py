"""Optional Triton kernels, each of which does in one launch what torch does in many, with torch's result.

`choose` sets where they run, and `run_on` is what the rest of the code asks before it imports one. Only the files of kernels
import Triton.
"""

from zo_hf.kernels.choice import CHOICES, choose, run_on, would_run_on

__all__ = ["CHOICES", "choose", "run_on", "would_run_on"]
