"""One line each on the parameters that do not move: at the start of a run, and after the first step."""

from __future__ import annotations

import logging
from collections import Counter

from torch import nn

from zo_hf.quantization import coded_layers, is_coded
from zo_hf.subspaces.adapter import Adapter
from zo_hf.subspaces.norms import Norms
from zo_hf.subspaces.scales import Scales
from zo_hf.subspaces.subspace import Subspace

logger = logging.getLogger(__name__)


def report_what_stays(subspace: Subspace) -> None:
    """Log `what_stays`, as a warning if something stays that nobody has frozen."""
    described = what_stays(subspace)
    chosen = isinstance(subspace, Adapter | Norms | Scales) or subspace.target_modules is not None
    logger.log(logging.INFO if chosen or "(codes)" not in described else logging.WARNING, "%s", described)


def what_stays(subspace: Subspace) -> str:
    """Describe the layers that do not move in a run, with their share of the model's parameters."""
    model = subspace.model
    moving = {id(site.parameter) for site in subspace.sites}
    coded = coded_layers(model)
    sizes: Counter[str] = Counter()
    total, seen = 0, set()
    for module in model.modules():
        packed = coded.get(module, 0)
        total += packed
        is_moving = any(site.layer is not None and site.layer.module is module for site in subspace.sites)
        if packed and not is_moving:
            sizes[f"{_class_of(module)} (codes)"] += packed
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or (packed and is_coded(parameter)):
                continue
            seen.add(id(parameter))
            if packed and parameter is module._parameters.get("weight"):
                continue
            total += parameter.numel()
            if id(parameter) not in moving and parameter.numel():
                state = "not selected" if parameter.requires_grad else "frozen"
                sizes[f"{_class_of(module)} ({state})"] += parameter.numel()
    if not sizes:
        return "all parameters of the model move"
    kinds = ", ".join(f"{kind} {_share(size, total)}" for kind, size in sizes.most_common())
    return f"{_share(sum(sizes.values()), total)} of the parameters do not move: {kinds}"


def unread_parameters(subspace: Subspace) -> str:
    """Describe the parameters that no probe of the first step has read, with their share of those that could move."""
    sites = [site for site in subspace.sites if site.name in subspace.still]
    count = sum(site.shape.numel() for site in sites)
    total = sum(site.shape.numel() for site in subspace.sites)
    names = ", ".join(site.name for site in sites)
    return (
        f"{len(sites)} parameters ({_share(count, total)} of those that move) were not read by any probe of the first "
        f"step, so they do not move until a probe reads them: {names}"
    )


def _class_of(module: nn.Module) -> str:
    return type(module).__name__


def _share(count: int, total: int) -> str:
    percent = 100 * count / total
    return f"{percent:.1f}%" if percent >= 0.1 or not count else f"{percent:.1g}%"
