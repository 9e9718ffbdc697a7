"""Models whose weights do not fit on the device that computes: they are loaded block by block, and written back.

accelerate keeps such weights in the CPU's memory or on the disk, and its hooks load the weights of each layer for each call
of it. Training loads a whole block of the model at a time, and the next one beside it.
"""

from zo_hf.offload.adapter import bring_in, get_peft_model
from zo_hf.offload.hooks import check_values, computing_device, computing_devices, is_offloaded, offloaded_weights
from zo_hf.offload.loader import BlockLoader
from zo_hf.offload.values import Values, whole_state_dict
from zo_hf.offload.weight import OffloadedWeight

__all__ = [
    "BlockLoader",
    "OffloadedWeight",
    "Values",
    "bring_in",
    "check_values",
    "computing_device",
    "computing_devices",
    "get_peft_model",
    "is_offloaded",
    "offloaded_weights",
    "whole_state_dict",
]
