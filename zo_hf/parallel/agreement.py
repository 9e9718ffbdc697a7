"""The agreement of ranks on what they were started with: arguments, lengths of data, shapes of weights.

Ranks with other arguments would train apart, or wait for each other without end. One hash is all that crosses the network
if they agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_hf.parallel.ranks import Ranks, ReplicasDiffer

#: Differences that a message names.
SHOWN = 3
#: Characters of a value that a message shows.
WIDTH = 60


def check_agreement(ranks: Ranks, facts: Mapping[str, Any], device: torch.device) -> None:
    """Refuse to go on unless every rank has the same facts; the first collective of a run.

    Args:
        ranks: the processes that train together.
        facts: values by name, in the types of JSON; of another value, only its class counts.
        device: device on which the ranks communicate.

    Raises:
        ReplicasDiffer: ranks differ; the message is the same on all of them, and names what differs, with both values.
    """
    if ranks.grid.world_size == 1:
        return
    # Names stay in their order: the first differences are the ones to show.
    text = json.dumps(facts, default=lambda value: type(value).__name__).encode()
    digest = int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)
    if len(set(ranks.all_gather(torch.tensor(digest, device=device)).tolist())) == 1:
        return
    everyone = [json.loads(one) for one in _gathered(ranks, text, device)]
    raise ReplicasDiffer(
        f"the processes of this run disagree: {_differences(everyone)}; start all of them with the same arguments, model "
        "and data."
    )


def facts_of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the class of an optimizer, and the options and the shapes of its parameter groups."""
    facts: dict[str, Any] = {"the optimizer": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        values = group | {"parameters": [list(parameter.shape) for parameter in group["params"]]}
        del values["params"]
        facts |= {f"{name} of parameter group {index}": value for name, value in values.items()}
    return facts


def _gathered(ranks: Ranks, text: bytes, device: torch.device) -> list[bytes]:
    """Return the texts of all ranks, whose lengths differ."""
    lengths = ranks.all_gather(torch.tensor(len(text), device=device)).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows: Tensor = ranks.all_gather(padded.to(device)).cpu()
    return [bytes(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]


def _differences(everyone: list[dict[str, Any]]) -> str:
    first = everyone[0]
    found = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        for rank, facts in enumerate(everyone):
            if (name in facts, facts.get(name)) != (name in first, first.get(name)):
                this, that = _shown(first, facts, name)
                found.append(f"{name} is {this} on rank 0 and {that} on rank {rank}")
                break
    more = len(found) - SHOWN
    return ", ".join(found[:SHOWN]) + (f", and {more} more" if more > 0 else "")


def _shown(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> list[str]:
    """Return two values as texts, cut to the place where they differ."""
    texts = [repr(facts[name]) if name in facts else "absent" for facts in (first, second)]
    alike = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    start = max(0, alike - WIDTH // 2) if max(map(len, texts)) > WIDTH else 0
    shown = []
    for text in texts:
        cut = text[start : start + WIDTH]
        shown.append("..." * (start > 0) + cut + "..." * (start + WIDTH < len(text)))
    return shown
