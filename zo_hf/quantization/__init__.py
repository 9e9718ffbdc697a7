"""Support for 8-bit and 4-bit models, one file per format."""

from __future__ import annotations

from zo_hf.quantization.layer import QuantizedLayer
from zo_hf.quantization.model import (
    coded_layers,
    is_coded,
    is_quantized,
    parts_of_codes,
    quantized_layers,
    stored_tensors,
    training_allowed,
)

__all__ = [
    "QuantizedLayer",
    "coded_layers",
    "is_coded",
    "is_quantized",
    "parts_of_codes",
    "quantized_layers",
    "stored_tensors",
    "training_allowed",
]
