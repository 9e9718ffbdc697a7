"""bitsandbytes' Linear8bitLt: LLM.int8() (Dettmers et al., arXiv 2208.07339).

    Ŵ = CB · SCB / 127        CB (m, n) int8, SCB (m,) float32, the largest magnitude of each row

The first forward moves CB and SCB from the weight to `module.state`, and shares CB with `weight.data`. SCB is neither
a parameter nor a buffer, yet the state dict contains it. "Outliers" are columns of the input, chosen at every forward;
the weights have none.

The forward also rounds the input to integers. For a perturbation of 1e-3 this rounding exceeds the difference of the
losses (docs/quantized.md has figures), so probes multiply by the decoded weights instead.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from zo_hf.quantization.rowwise import LARGEST, RowwiseInt8


class _Once(logging.Filter):
    """Drops repetitions of one warning.

    Every layer of a float32 or bfloat16 model warns at every forward that its inputs become float16.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if "inputs will be cast" not in str(record.msg):
            return True
        new = record.args not in self._said
        self._said.add(record.args)
        return new


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())


class BitsAndBytesInt8(RowwiseInt8):
    """The layer of the formula above; `module` is a `bitsandbytes.nn.Linear8bitLt` with a quantized weight."""

    rounds_activations = True
    format = "int8 of bitsandbytes"

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        if module.weight.CB is not None:  # as its first forward would do
            module.init_8bit_state()
            module.weight.data = module.state.CB

    def storage(self) -> dict[str, Tensor]:
        return {"weight": self.module.state.CB, "SCB": self.module.state.SCB}

    def codes(self, storage: dict[str, Tensor]) -> Tensor:
        return storage["weight"]

    def units(self, storage: dict[str, Tensor]) -> Tensor:
        return storage["SCB"] / LARGEST

    def set_units(self, storage: dict[str, Tensor], start: int, units: Tensor) -> Tensor:
        stored = storage["SCB"][start : start + len(units)]
        stored.copy_(units * LARGEST)
        return stored / LARGEST
