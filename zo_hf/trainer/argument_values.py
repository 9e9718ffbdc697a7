"""The values that Trainer's own arguments and the `zo_*` options of a run take, beside those of the method.

Trainer declares types and few ranges, and most wrong values of its arguments end in NaN, in an endless loop or in a
traceback of another library. The types here are Trainer's; the ranges are what a run without a backward pass can use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from enum import Enum
from os import PathLike
from types import UnionType
from typing import Any, Union, get_args, get_origin

from transformers import Seq2SeqTrainingArguments

from zo_hf.method_info import Choice, Flag, Name, OneOrMore, Pattern, Real, Texts, Values, Whole, checked, plain
from zo_hf.parallel.ranks import PARALLEL
from zo_hf.stability.actions import ACTIONS

#: A larger rate, or decay, overflows the weights within a few steps.
MOST_RATE = 1e6

#: Above this, processes that load data exhaust a machine before the first step.
MOST_WORKERS = 1024

_DEFAULT = "leave it out for the default"
_NONE = (None,)

#: The range of every argument that needs more than its type, and the way out.
_RANGES: dict[str, tuple[Values, str]] = {
    "learning_rate": (
        Real(0, MOST_RATE, also=(None, "auto")),
        "give a positive number, 'auto', or leave it out for the default",
    ),
    "weight_decay": (Real(0, MOST_RATE), "use 0 for no decay"),
    "adam_beta1": (Real(0, 1, below=True), "0.9 is the default"),
    "adam_beta2": (Real(0, 1, below=True), "0.999 is the default"),
    "adam_epsilon": (Real(1e-37, 1e6), "1e-8 is the default"),  # float32 rounds smaller ones to 0
    "max_grad_norm": (Real(0), "use 0 to clip nothing"),
    "label_smoothing_factor": (Real(0, 1), "use 0 for no smoothing"),
    "max_steps": (Whole(-1), "use -1 to let num_train_epochs decide"),
    "num_train_epochs": (Real(0, 1e12), "3 is the default"),
    "warmup_steps": (Real(0), "use 0 for no warmup"),
    "per_device_train_batch_size": (Whole(1), "8 is the default"),
    "per_device_eval_batch_size": (Whole(1), "8 is the default"),
    "gradient_accumulation_steps": (Whole(1), "use 1 to accumulate nothing"),
    "eval_accumulation_steps": (Whole(1, also=_NONE), _DEFAULT),
    "torch_empty_cache_steps": (Whole(1, also=_NONE), "leave it out to never empty the cache"),
    "save_total_limit": (Whole(0, also=_NONE), "leave it out to keep all checkpoints"),
    "eval_delay": (Real(0), "use 0 to evaluate from the start"),
    # numpy takes no other seeds.
    "seed": (Whole(0, 2**32 - 1), "42 is the default"),
    "data_seed": (Whole(0, 2**32 - 1, also=_NONE), "leave it out to take the seed"),
    "dataloader_num_workers": (Whole(0, MOST_WORKERS), "use 0 to load data in the process that trains"),
    "dataloader_prefetch_factor": (Whole(1, MOST_WORKERS, also=_NONE), _DEFAULT),
    "ddp_timeout": (Whole(1, 10**9), "1800 is the default"),
    "ddp_bucket_cap_mb": (Whole(1, also=_NONE), _DEFAULT),
    "generation_max_length": (Whole(1, also=_NONE), _DEFAULT),
    "generation_num_beams": (Whole(1, also=_NONE), _DEFAULT),
    # Trainer takes a word, or a bool, whatever type it declares.
    "fsdp": (Name(also=(None, True, False)), _DEFAULT),
    "resume_from_checkpoint": (
        Name(also=(None, True, False)),
        "give the folder of a checkpoint, or True for the last",
    ),
    # Options of zeroth-order training that are not of its method.
    "zo_max_forward_passes": (Whole(1, also=_NONE), "leave it out for no limit"),
    "zo_max_time": (Real(0, above=True, also=_NONE), "leave it out for no limit, or give seconds"),
    "zo_dp_delta": (
        Real(0, 1, above=True, below=True, also=_NONE),
        "leave it out for the largest power of ten below 1/n",
    ),
    "zo_dp_target_epsilon": (Real(0, above=True, also=_NONE), "leave it out for no limit"),
    "zo_feature_cache_gib": (Real(0, 1e6), "use 0 to keep nothing"),
    "save_only_trajectory": (Flag(), "False saves whole checkpoints"),
    "zo_parallel": (Choice(PARALLEL), "data is the default"),
    "zo_pipeline_stages": (Whole(1, also=("auto",)), "use 'auto' for all processes with zo_parallel='pipeline'"),
    "zo_check_steps": (Whole(0), "use 0 to never check"),
    "server_url": (OneOrMore(also=_NONE), "give an address such as 'http://127.0.0.1:8000', or a list of them"),
    "server_max_loras": (Whole(1), "give the server's --max-loras"),
    "server_folder": (Name(also=_NONE), _DEFAULT),
    "server_timeout": (Real(0, above=True), "600 is the default"),
    "zo_stability_steps": (Whole(0), "use 0 to measure nothing"),
    "zo_stability_action": (Choice(ACTIONS), "warn is the default"),
}

#: The names in optim_args that an optimizer of Trainer reads; it passes over others in silence.
_READ: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad"), ()),
}

#: Intervals: numbers of steps, or fractions of the run.
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")


def values_of_type(declared: Any) -> Values | None:
    """Return the values of a type that Trainer declares; None for types whose values are not checked."""
    kinds = set(get_args(declared)) if get_origin(declared) in (Union, UnionType) else {declared}
    also = _NONE if type(None) in kinds else ()
    kinds -= {type(None)}
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if choices and kinds <= {*choices, str}:
        return Choice(tuple(str(member.value) for member in choices[0]), also=also)
    by_type: dict[frozenset[Any], Callable[[], Values]] = {
        frozenset({bool}): lambda: Flag(also=also),
        frozenset({int}): lambda: Whole(-1, also=also),
        frozenset({float}): lambda: Real(also=also),
        frozenset({str}): lambda: Name(also=also),
        frozenset({str, list[str]}): lambda: Pattern(also=also),
        frozenset({list[str]}): lambda: Texts(also=also),
    }
    make = by_type.get(frozenset(kinds))
    return None if make is None else make()


def _declared() -> dict[str, tuple[Values, str]]:
    """Return the values of all arguments: those of the ranges above, then those of Trainer's types."""
    found = dict(_RANGES)
    for part in fields(Seq2SeqTrainingArguments):
        values = values_of_type(part.type)
        if part.init and part.name not in found and values is not None:
            found[part.name] = values, _DEFAULT
    return found


#: The values of every argument that is checked, and the way out.
ARGUMENT_VALUES = _declared()


def check_arguments(args: Any) -> None:
    """Check the arguments of a run one by one; numbers of numpy become Python's own.

    Args:
        args: the arguments, a `ZOConfig` whose values are as the user gave them.

    Raises:
        ValueError: an argument does not take its value; the message names it and the way out.
    """
    for part in fields(args):
        if part.name not in ARGUMENT_VALUES or not part.init:
            continue
        value, default = getattr(args, part.name), part.default
        # A subclass may have defaults that Trainer's types do not allow, and resolve them later.
        is_default = default is not MISSING and type(value) is type(default) and bool(value == default)
        if not (is_default or isinstance(value, PathLike)):
            setattr(args, part.name, checked(part.name, value, *ARGUMENT_VALUES[part.name]))
    for name in _INTERVALS:
        setattr(args, name, _interval(name, getattr(args, name)))
    if isinstance(args.output_dir, str) and not args.output_dir.strip():
        raise ValueError("output_dir='' names no folder; leave it out for the default, or name one.")
    _check_optim_args(str(plain(args.optim)), args.optim_args)
    if args.logging_steps == 0 and plain(args.logging_strategy) == "steps":
        raise ValueError("logging_steps=0 must be above 0; use logging_strategy='no' to log nothing.")
    if not args.dataloader_num_workers:
        _refuse_options_of_workers(args)
    rate = args.learning_rate
    if isinstance(rate, int | float) and rate * args.weight_decay >= 1:
        raise ValueError(
            f"weight_decay={args.weight_decay} with learning_rate={rate} would flip the sign of every weight in each step; "
            "keep their product below 1."
        )


def check_learning_rate(value: Any) -> None:
    """Check a learning rate that was set after the arguments were checked, as a hyperparameter search does.

    Raises:
        ValueError: it is not a number from 0 to 1e6, "auto" or None.
    """
    checked("learning_rate", value, *_RANGES["learning_rate"])


def _refuse_options_of_workers(args: Any) -> None:
    for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(
                f"{name}={value} has no effect with dataloader_num_workers=0; leave it out, or use 1 or more."
            )


def _interval(name: str, value: float | None) -> float | None:
    """Return a number of steps as an int, and a fraction of the run as it is."""
    if value is None:
        return None
    if value < 0 or (value > 1 and value != int(value)):
        raise ValueError(f"{name}={value} must be a whole number of steps, or a fraction of the run below 1; use 10.")
    return int(value) if value == int(value) else value


def _check_optim_args(optim: str, text: str | None) -> None:
    """Refuse arguments of an optimizer that it does not read, that are no pairs, or that are no numbers it can use."""
    if not text:
        return
    for word in text.replace(" ", "").split(","):
        name, equals, value = word.partition("=")
        if not (name and equals and value) or "=" in value:
            raise ValueError(f"optim_args={text!r} must be pairs such as 'momentum=0.9,dampening=0'; write them so.")
        read = _READ.get(optim)
        if read is not None and name not in read:
            known = f"use {', '.join(read)}" if read else "leave it out"
            raise ValueError(f"optim_args={text!r} has {name}, which optim={optim!r} does not read; {known}.")
        _check_optim_number(text, name, value)


def _check_optim_number(text: str, name: str, value: str) -> None:
    try:
        number = float(value)
    except ValueError:
        if name in ("momentum", "dampening", "weight_decay"):
            raise ValueError(f"optim_args={text!r} has {name}={value}, which is not a number; give one.") from None
        return  # the optimizer knows
    if not math.isfinite(number):
        raise ValueError(f"optim_args={text!r} has {name}={value}, which is not a finite number; give one.")
    if name == "momentum" and not 0 <= number < 1:
        raise ValueError(f"optim_args={text!r} must have a momentum of at least 0 and below 1; 0.9 is common.")
    if name == "weight_decay" and not 0 <= number <= MOST_RATE:
        raise ValueError(f"optim_args={text!r} must have a weight_decay of at least 0; leave it out for none.")
