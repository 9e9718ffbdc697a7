"""A 64-bit checksum of a tensor's bits: integer sums alone, so that it is the same on every device.

    sum over i of (bits of element i, times (2·i + 1) · ODD)  mod 2⁶⁴

The factors are odd, hence invertible mod 2⁶⁴: any change to a single element changes the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
_ODD = -7046029254386353131  # 2⁶⁴ / the golden ratio, as a signed integer: neighbouring positions differ in high bits
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def tensor_checksum(tensor: Tensor) -> int:
    """Checksum of a tensor of any dtype whose elements have 1, 2, 4 or 8 bytes; complex ones count as two.

    Returns:
        A signed 64-bit integer. Shape and dtype are not part of it.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        position = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (2 * position + 1).mul_(_ODD)).sum()
    return int(total)
