"""Memory sizes written with a unit."""

import math
import re

_UNITS = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)}
GB = _UNITS["gb"]


def parse_size(text: str) -> int:
    """Convert a size such as 24GB, 80 GB, 16GiB or 8.5gb to bytes; GB is 10⁹ bytes and GiB is 2³⁰.

    Raises:
        ValueError: `text` is not a positive number and a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text, re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size < math.inf:
        raise ValueError(f"gpu_memory={text!r} is not a size; write a number and a unit, such as 24GB or 16GiB.")
    return round(size)
