"""Values that are no values: every option of a run by itself, and pairs of options.

The table is made from the values that the options declare. An answer is right if the run is refused in a sentence that
names the option, with nothing written and no weight moved; or if two steps on a tiny model leave finite weights, which
have moved unless the value keeps them still. A value that the declaration rules out must be refused.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attacks.suite import Case
from tests.conftest import TinyTask, seeded, tiny_opt, weights_of
from tests.trainer.runs import make_trainer
from zo_hf import ZerothOrder
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.method_info import Choice, Flag, Name, OneOrMore, Pattern, Real, Texts, Values, Whole
from zo_hf.rules import RULES
from zo_hf.settings import Settings
from zo_hf.subspaces import SUBSPACES
from zo_hf.trainer.argument_values import ARGUMENT_VALUES

SAMPLE = 16

METHOD: dict[str, Values] = {part.name: part.metadata["values"] for part in fields(Settings)}

#: What an option needs to have an effect.
PARTNERS: dict[str, dict[str, Any]] = {
    "zo_active_layers": {"zo_direction": "layers"},
    "zo_coordinate_order": {"zo_estimator": "coordinate"},
    "zo_momentum": {"zo_rule": "muon", "zo_num_directions": 2},
    "zo_momentum_at_fold": {"zo_rule": "muon", "zo_num_directions": 2, "zo_momentum": 0.5},
    "zo_spectral_rank": {"zo_rule": "power_iteration", "zo_num_directions": 2},
    "zo_curvature_rate": {"zo_rule": "curvature", "zo_estimator": "second_difference"},
    "zo_cocd_decay": {"zo_rule": "cocd", "zo_estimator": "coordinate"},
    "zo_cocd_memory": {"zo_rule": "cocd", "zo_estimator": "coordinate"},
    "zo_svrg_batches": {"zo_rule": "svrg", "zo_fold_steps": 0},
    "zo_svrg_steps": {"zo_rule": "svrg", "zo_fold_steps": 0, "zo_svrg_batches": 1},
    "zo_stability_action": {"zo_stability_steps": 1},
    **{name: {"optim": "adamw_torch"} for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    "eval_steps": {"eval_strategy": "steps"},
    "save_steps": {"save_strategy": "steps"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
}

#: Options that need another machine, write outside of the run's folder, or only matter after the training.
LEFT_OUT = (
    {"output_dir", "push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"}
    | {"hub_always_push", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "use_cpu", "local_rank"}
    | {"torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "tf32", "report_to"}
    | {"log_level", "log_level_replica", "full_determinism", "enable_jit_checkpoint", "fsdp"}
    | {"dataloader_multiprocessing_context", "deepspeed", "ddp_backend", "optim_target_modules", "disable_tqdm"}
)

#: Options that may keep the weights where they are, with the values that do.
STILL: dict[str, Any] = {
    "learning_rate": lambda value: value in (0, 1e-300),
    "max_grad_norm": lambda value: value == 1e-300,
    "zo_max_projected_grad": lambda value: value == 1e-300,
    "zo_eps": lambda value: value < 1e-5,
    "zo_svrg_batches": lambda value: value > 2,
    "zo_max_forward_passes": lambda value: True,
    "adam_epsilon": lambda value: value > 1,
    "optim_args": lambda value: True,
    "dataloader_drop_last": lambda value: True,
}

TYPES: tuple[Any, ...] = ("", "x", [], [1], {"a": 1}, b"1", 1j, True, None, 1.5, 2, np.float64(0.5), np.int64(2))
TYPES += (np.array([1, 2]), np.bool_(True), "1", ["fc1"], ("fc1", "fc2"), "(", "*", torch.tensor(1.0), object, "auto")
NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 1e-300, 1e300, 10**30, 10**400, np.nan)
NUMBERS += (np.float32("inf"), 1, 0.5, 2**63, -(10**30), -0.0)


@dataclass(frozen=True)
class Attack:
    """Some options with their values.

    Args:
        options: arguments of `ZOConfig`.
        refused: True if the run must be refused, and None if either answer can be right.
        moves: False if the weights may stay.
    """

    options: dict[str, Any]
    refused: bool | None
    moves: bool


def cases() -> list[Case]:
    """Return every option with every value, and pairs of options."""
    attacks = [*_of_method(), *_of_trainer(), *_optimizer_arguments(), *_pairs()]
    found, seen = [], set()
    for attack in attacks:
        name = ", ".join(f"{option}={_name(value)}" for option, value in attack.options.items())
        if name not in seen:
            seen.add(name)
            found.append(Case(name, lambda folder, attack=attack: _answer(attack, folder)))
    return found + list(_of_engine())


def _name(value: Any) -> str:
    text = "10**400" if isinstance(value, int) and value > 10**300 else repr(value)
    return f"{type(value).__name__} {text}"


def _of_method() -> Iterator[Attack]:
    for option, values in METHOD.items():
        if option == "seed":
            continue
        name = f"zo_{option}"
        for value in _values(values):
            yield _single(name, value, _refused(values, value, name))
    for name, registry in (
        ("zo_estimator", ESTIMATORS),
        ("zo_direction", DISTRIBUTIONS),
        ("zo_rule", RULES),
        ("zo_subspace", SUBSPACES),
    ):
        for value in registry:
            yield Attack({name: value, "zo_num_directions": 2}, None, moves=value not in ("svrg", "conservative"))


def _of_trainer() -> Iterator[Attack]:
    names = [name for name in ARGUMENT_VALUES if name not in LEFT_OUT]
    for number, name in enumerate(names):
        values = ARGUMENT_VALUES[name][0]
        # Every flag and every string is checked in the same way, so that each takes a part of the values.
        few = not isinstance(values, Whole | Real)
        for value in _values(values)[number % 5 if few else 0 :: 5 if few else 1]:
            yield _single(name, value, _refused(values, value, name))


def _single(name: str, value: Any, refused: bool | None) -> Attack:
    is_number = isinstance(value, int | float)
    still = name in STILL and not refused and is_number and STILL[name](value)
    return Attack(PARTNERS.get(name, {}) | {name: value}, refused, moves=not still)


def _values(values: Values) -> tuple[Any, ...]:
    if isinstance(values, Whole | Real):
        ends = [end for end in (values.low, values.high) if abs(end) < 1000]
        past = [values.low - 1, values.high + 1] if isinstance(values, Whole) else []
        return (*TYPES, *NUMBERS, *ends, *past)
    return TYPES + NUMBERS[:8]


def _refused(values: Values, value: Any, name: str) -> bool | None:
    """Return whether the declared values leave no choice but to refuse."""
    if value is None or isinstance(value, str):
        if any(value is other or value == other for other in values.also):
            return None
        if name in ("zo_eps", "learning_rate", "zo_rows_per_direction"):
            return None if value in (None, "1", "auto") else True  # words of a command line
        if value is None:
            return None  # a default that Trainer resolves
    if isinstance(values, Whole | Real):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
            return True
        if isinstance(values, Whole) and not isinstance(value, int | np.integer):
            return True
        if isinstance(value, float | np.floating) and not math.isfinite(value):
            return True
        return True if not values.low <= value <= values.high else None
    if isinstance(values, Flag):
        return None if isinstance(value, bool | np.bool_) else True
    if isinstance(values, Choice | Name):
        return None if isinstance(value, str | bool) else True
    assert isinstance(values, Pattern | Texts | OneOrMore)
    return None if isinstance(value, str | list | tuple) else True


def _optimizer_arguments() -> Iterator[Attack]:
    for text in ("momentum=nan", "momentum=inf", "momentum=-1", "momentum=1", "momentum=2", "momentum=1e300"):
        yield Attack({"optim_args": text}, refused=True, moves=False)
    for text in ("momentum", "momentum=", "=0.9", "momentum=0.9=1", ",", "momentum=0.9,", "dampening=nan"):
        yield Attack({"optim_args": text}, refused=True, moves=False)
    for text in ("lr=nan", "lr=-1", "no_such=1", "momentum=x", "eps=nan", "betas=inf", "weight_decay=nan"):
        yield Attack({"optim": "adamw_torch", "optim_args": text}, refused=True, moves=False)
    for text in ("momentum=0.9", "momentum=0", "momentum=0.9,dampening=0.1", "nesterov=True,momentum=0.5", ""):
        yield Attack({"optim_args": text}, refused=None, moves=False)
    for rate, decay in ((1.0, 1.0), (1e-2, 100.0), (1e3, 1e3), (1e-2, 1e6), (1e-300, 1e6), (1e6, 0.0), (1e6, 1e-7)):
        yield Attack({"learning_rate": rate, "weight_decay": decay}, True if rate * decay >= 1 else None, moves=False)


def _pairs() -> Iterator[Attack]:
    """Yield pairs of values that are each allowed, at the ends of their ranges and inside."""
    allowed: dict[str, list[Any]] = {
        "zo_subspace": list(SUBSPACES),
        "zo_estimator": list(ESTIMATORS),
        "zo_direction": list(DISTRIBUTIONS),
        "zo_rule": list(RULES),
        "zo_rank": [1, 31, 32, 10**9],
        "zo_fold_steps": [0, 1, 10**9],
        "zo_eps": [1e-12, 1e-6, 1.0, 100.0],
        "zo_num_directions": [1, 2, 17],
        "zo_rows_per_direction": [0, 1, 10**9, "auto"],
        "zo_noise_scale_steps": [0, 1],
        "zo_active_layers": [1e-9, 1.0],
        "zo_momentum": [0.0, 0.999999],
        "zo_spectral_rank": [1, 10**9],
        "zo_curvature_rate": [0.0, 0.999999],
        "zo_cocd_memory": [1, 2, 10**9],
        "zo_svrg_batches": [1, 2, 100_000],
        "zo_max_projected_grad": [0, 1e-9, 1e9],
        "zo_normalize": [True],
        "zo_batched_probes": [True, False],
        "zo_max_forward_passes": [1, 7, 10**15],
        "zo_stability_steps": [1, 997],
        "optim": ["sgd", "adamw_torch", "adafactor", "rmsprop"],
        "learning_rate": [0.0, 1e-4, 1e6, "auto"],
        "weight_decay": [0.1, 1e6],
        "max_grad_norm": [0.0, 1e-9, 1.0],
        "gradient_accumulation_steps": [2, 10**6],
        "bf16": [True],
        "zo_target_modules": ["(", ".*", ["fc1"]],
        "lr_scheduler_type": ["linear", "cosine", "constant_with_warmup"],
    }
    draw = random.Random(0)
    names = sorted(allowed)
    for _ in range(160):
        pair = draw.sample(names, 2)
        yield Attack({name: draw.choice(allowed[name]) for name in pair}, None, moves=False)


def _of_engine() -> Iterator[Case]:
    """Yield cases of the engine without a Trainer."""
    for option, values in METHOD.items():
        for value in _values(values):
            if _refused(values, value, option) and not (value is None or isinstance(value, str)):
                name = f"engine {option}={_name(value)}"
                yield Case(name, lambda folder, option=option, value=value: _engine_answer(option, value))


def _engine_answer(option: str, value: Any) -> str | None:
    model = seeded(tiny_opt)
    try:
        ZerothOrder(model, **{option: value})
    except ValueError as error:
        return _about(str(error), [option])
    return "was accepted"


def _answer(attack: Attack, folder: Path) -> str | None:
    options = {"max_steps": 2, "disable_tqdm": True} | attack.options
    model = seeded(tiny_opt)
    before, begun = weights_of(model), False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            trainer = make_trainer(folder, model, more={"train_dataset": TinyTask(16)}, **options)
            if trainer.args.max_steps not in (1, 2):
                trainer.args.max_steps = 2
            step = trainer.training_step

            def noted(*args: Any, **kwargs: Any) -> Any:
                nonlocal begun
                begun = True
                return step(*args, **kwargs)

            trainer.training_step = noted
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except ValueError as error:
        if begun:
            return f"was refused after the first step had begun: {str(error)[:200]}"
        if any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items()):
            return "was refused after weights had moved"
        if list(folder.iterdir()):
            return "was refused after files had been written"
        return _about(str(error), list(attack.options))
    if attack.refused:
        return "was accepted"
    after = weights_of(trainer.model)
    if not all(bool(tensor.isfinite().all()) for tensor in after.values() if tensor.is_floating_point()):
        return "left weights that are not finite"
    moved = after.keys() != before.keys() or any(not torch.equal(after[name], before[name]) for name in before)
    return None if moved or not attack.moves else "moved nothing"


def _about(message: str, options: list[str]) -> str | None:
    """Return what is wrong with a refusal; None if it is a sentence about one of the options."""
    if not any(option.removeprefix("zo_") in message for option in options):
        return f"the message names no option: {message[:200]}"
    plain = message.replace("...", "")
    if "\n" in plain or len(plain) > 500 or not plain.endswith(".") or plain.count(". ") > 1:
        return f"the message is not one sentence: {message[:200]}"
    return None
