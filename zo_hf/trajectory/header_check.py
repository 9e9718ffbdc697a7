"""Checks of a log's header: every entry has the type and the range that `header.py` writes."""

from __future__ import annotations

import re
from typing import Any

from zo_hf.untrusted.fields import (
    Fits,
    distinct,
    either,
    first_misfit,
    is_flag,
    is_number,
    is_object,
    is_text,
    list_of,
    maybe,
    object_of,
    whole,
)

MAX_PER_STEP = 1 << 16
MAX_NAME = 1024
# A user's optimizer may have a few groups without a coordinate.
_EMPTY_GROUPS = 16

_VALUE = maybe(either(is_flag, is_number, lambda value: isinstance(value, str)))


def _is_name(value: Any) -> bool:
    return is_text(value) and 0 < len(value) <= MAX_NAME


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{64}", value))


_HEADER: dict[str, Fits] = {
    "zo_hf": maybe(is_text),
    "torch": maybe(is_text),
    "first_step": whole(0, (1 << 32) - 1),
    "directions": whole(1, MAX_PER_STEP),
    "settings": is_object,
    "optimizer": is_object,
    "groups": list_of(is_object, 1, MAX_PER_STEP),
    "base": is_object,
    "still": maybe(distinct(_is_name)),
    "start": maybe(_is_hash),
}
_SETTINGS: dict[str, Fits] = {
    "zo_subspace": is_text,
    "zo_rank": maybe(whole(1)),
    "zo_fold_steps": maybe(whole()),
    "zo_eps": is_number,
    "zo_num_directions": whole(1, MAX_PER_STEP),
    "zo_direction": is_text,
    "zo_max_projected_grad": maybe(is_number),
    "zo_normalize": is_flag,
    "seed": whole(-(1 << 63)),
    "coordinates": whole(1),
}
_OPTIMIZER: dict[str, Fits] = {"kind": is_text, "replayable": is_flag}
_GROUP: dict[str, Fits] = {"names": distinct(_is_name), "options": object_of(either(_VALUE, list_of(_VALUE, most=16)))}
_BASE: dict[str, Fits] = {
    "name": maybe(is_text),
    "revision": maybe(is_text),
    "class": maybe(is_text),
    "dtype": maybe(is_text),
    "device": maybe(is_text),
    "quantization": maybe(is_object),
    "weights": maybe(_is_hash),
}


def why_unusable(header: Any) -> str | None:
    """Return, as a clause, why a header is not one that a run has written; None if it is one.

    Args:
        header: the content of the header, as JSON gives it.
    """
    if not is_object(header):
        return "it is no object of JSON"
    groups = header.get("groups")
    sections = [("", header, _HEADER)]
    sections += [(f"{name}.", header.get(name), table) for name, table in _TABLES.items()]
    if isinstance(groups, list):
        sections += [(f"groups[{index}].", group, _GROUP) for index, group in enumerate(groups[:MAX_PER_STEP])]
    for prefix, section, table in sections:
        wrong = first_misfit(section, table) if isinstance(section, dict) else None
        if wrong is not None:
            return f"{prefix}{wrong} is missing or has a value that no run writes"
    assert isinstance(groups, list)
    names = [name for group in groups for name in group["names"]]
    if len(groups) > len(names) + _EMPTY_GROUPS:
        return "it has far more groups than coordinates"
    if len(set(names)) < len(names):
        return "groups name a coordinate twice"
    if not set(header.get("still") or ()) <= set(names):
        return "still names what no group moves"
    if header["directions"] < header["settings"]["zo_num_directions"]:
        return "directions is below settings.zo_num_directions"
    return None


_TABLES = {"settings": _SETTINGS, "optimizer": _OPTIMIZER, "base": _BASE}
