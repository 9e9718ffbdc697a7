"""Methods that can be compared: a name, options of ZOConfig, and the learning rate with which tuning begins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.rules import RULES
from zo_hf.subspaces import SUBSPACES
from zo_hf.trainer.config import ZOConfig

#: The names of the methods that every report compares with.
REFERENCE, ONE_DIRECTION, FORWARD_GRADIENT, FIRST_ORDER = "mezo", "low_rank", "forward gradient", "adamw with backward"
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "zo_subspace": SUBSPACES,
    "zo_estimator": ESTIMATORS,
    "zo_direction": DISTRIBUTIONS,
    "zo_rule": RULES,
}
MATRICES = {"zo_exclude_modules": r".*(embed|norm).*"}
LOW_RANK = {"zo_subspace": "low_rank"} | MATRICES
FULL = {"zo_subspace": "full"} | MATRICES
ROWS = {"zo_rows_per_direction": 1, "zo_direction": "rademacher"}
FOUR = {"zo_num_directions": 4}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        group: the panel of the figures in which the method is drawn.
        rate: the center of its grid of learning rates.
        options: options of ZOConfig; `"backward": True` is a plain Trainer.
    """

    group: str
    rate: float
    options: Mapping[str, Any]


METHODS = {
    REFERENCE: Method("subspaces", 3e-5, FULL),
    "mezo all weights": Method("subspaces", 1e-5, {"zo_subspace": "full"}),
    ONE_DIRECTION: Method("subspaces", 3e-5, LOW_RANK),
    "core": Method("subspaces", 3e-5, MATRICES | {"zo_subspace": "core"}),
    "lora": Method("subspaces", 3e-4, {"zo_subspace": "adapter"}),
    "norms": Method("subspaces", 3e-3, {"zo_subspace": "norms"}),
    "mezo rademacher": Method("directions", 3e-5, FULL | {"zo_direction": "rademacher"}),
    "sphere": Method("directions", 3e-5, LOW_RANK | {"zo_direction": "sphere"}),
    "orthogonal q4": Method("directions", 1e-4, LOW_RANK | FOUR | {"zo_direction": "orthogonal"}),
    "sparse": Method("directions", 3e-5, FULL | {"zo_direction": "sparse"}),
    "layers": Method("directions", 3e-5, LOW_RANK | {"zo_direction": "layers"}),
    "adaptive layers": Method("directions", 3e-5, LOW_RANK | {"zo_direction": "adaptive_layers"}),
    "two_point q4": Method("estimators", 1e-4, LOW_RANK | FOUR),
    "one_sided q4": Method("estimators", 1e-4, LOW_RANK | FOUR | {"zo_estimator": "one_sided"}),
    "fzoo q8": Method(
        "estimators",
        1e-6,
        LOW_RANK | {"zo_estimator": "fzoo", "zo_direction": "rademacher", "zo_num_directions": 8},
    ),
    "evolution q4": Method("estimators", 3e-4, LOW_RANK | FOUR | {"zo_estimator": "evolution"}),
    "rows": Method("estimators", 1e-4, LOW_RANK | ROWS),
    "rows adamw": Method("optimizers", 1e-3, LOW_RANK | ROWS | {"optim": "adamw_torch"}),
    "cocd": Method(
        "estimators",
        1e-3,
        {"zo_subspace": "norms", "zo_estimator": "coordinate", "zo_rule": "cocd", "zo_num_directions": 8},
    ),
    "low_rank normalized": Method("optimizers", 3e-4, LOW_RANK | {"zo_normalize": True}),
    "low_rank momentum": Method("optimizers", 3e-6, LOW_RANK | {"optim_args": "momentum=0.9"}),
    "low_rank adamw": Method("optimizers", 1e-3, LOW_RANK | {"optim": "adamw_torch"}),
    "sign": Method("optimizers", 3e-4, LOW_RANK | {"zo_rule": "sign"}),
    "conservative": Method("rules", 3e-5, LOW_RANK | {"zo_rule": "conservative"}),
    "curvature": Method("rules", 3e-5, LOW_RANK | {"zo_estimator": "second_difference", "zo_rule": "curvature"}),
    "svrg": Method("rules", 3e-5, LOW_RANK | {"zo_rule": "svrg"}),
    "zo-muon": Method(
        "rules",
        3e-4,
        LOW_RANK | FOUR | {"zo_rank": 64, "zo_fold_steps": 100, "zo_estimator": "one_sided", "zo_rule": "muon"},
    ),
    "power_iteration": Method(
        "rules",
        3e-4,
        LOW_RANK
        | FOUR
        | {"zo_rank": 64, "zo_fold_steps": 100, "zo_estimator": "one_sided", "zo_rule": "power_iteration"},
    ),
    FORWARD_GRADIENT: Method("controls", 3e-5, LOW_RANK | {"zo_estimator": "forward_gradient"}),
    FIRST_ORDER: Method("controls", 3e-5, MATRICES | {"backward": True, "optim": "adamw_torch"}),
}


def follows_slopes(options: Mapping[str, Any]) -> bool:
    """Return whether a step grows with the slopes of the loss, so that another model or loss wants another rate."""
    divided = options.get("zo_normalize") or "adamw" in str(options.get("optim"))
    rule, estimator = RULES[options.get("zo_rule", "none")], ESTIMATORS[options.get("zo_estimator", "two_point")]
    return not (divided or rule.divides_scale_out or estimator.is_scale_free)


def added_method(words: list[str]) -> tuple[str, Method]:
    """Return the method that `--add` describes.

    Raises:
        ValueError: the words are not a name, a learning rate, and options.
    """
    name, *numbers = words[:2]
    pairs = [word.partition("=") for word in words[2:]]
    if not numbers or not all(separator for _, separator, _ in pairs):
        raise ValueError(f"--add {' '.join(words)} must be a name, a learning rate, and OPTION=VALUE words.")
    return name, Method("added", float(numbers[0]), {option: read_value(value) for option, _, value in pairs})


def read_value(word: str) -> Any:
    """Parse a word of the command line as YAML, and a number like 1e-8 as a number."""
    value = yaml.safe_load(word)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def choose(patterns: list[str] | None, methods: dict[str, Method]) -> dict[str, Method]:
    """Return the methods whose whole name matches a pattern; skip those that this version of zo_hf does not have.

    Raises:
        ValueError: a pattern matches no method.
    """
    for pattern in patterns or []:
        if not any(re.fullmatch(pattern, name) for name in methods):
            raise ValueError(f"--methods {pattern} matches none of {', '.join(methods)}.")
    chosen = {}
    for name, method in methods.items():
        if patterns is not None and not any(re.fullmatch(pattern, name) for pattern in patterns):
            continue
        missing = missing_options(method.options)
        if missing:
            print(f"skipped {name}: this version of zo_hf has no {', '.join(missing)}")
        else:
            chosen[name] = method
    return chosen


def missing_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options of a method that this version of zo_hf does not have, or not with this value."""
    known = {field.name for field in fields(ZOConfig)} | {"backward"}
    return [
        f"{option}={value}"
        for option, value in options.items()
        if option not in known or (option in REGISTRIES and value not in REGISTRIES[option])
    ]
