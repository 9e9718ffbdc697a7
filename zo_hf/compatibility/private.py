"""Options that private training does not combine with: what would break its theorem, or tell of the rows beside it."""

from __future__ import annotations

from typing import Any

from zo_hf.case import Case
from zo_hf.compatibility.conflict import Conflict, either, rows_of
from zo_hf.method_info import plain

#: Estimators whose numbers are a row's own: no division by what other rows have.
PRIVATE_ESTIMATORS = ("two_point", "one_sided")
#: Options of private training that are none of `Settings`.
_OF_RUNS = ("zo_dp_delta", "zo_dp_target_epsilon")

_LEAKS = "it measures the rows without noise"
_MULTIPLIER = "zo_dp_noise_multiplier={zo_dp_noise_multiplier}"


_private = rows_of(_MULTIPLIER, lambda case: case.settings.is_private)


def _given(name: str, why: str, instead: str, *allowed: Any) -> Conflict:
    """Return the row of an argument that must be absent, false, or one of some values."""

    def applies(case: Case) -> bool:
        value = plain(case.argument(name))
        return bool(value) and value not in allowed

    return _private(f"{name}={{{name}}}", why, instead, applies)


def _alone(name: str) -> Conflict:
    return Conflict(
        f"{name}={{{name}}}",
        "zo_dp_noise_multiplier=None",
        "",
        "leave it out, or give zo_dp_noise_multiplier",
        lambda case: not case.settings.is_private and case.argument(name) is not None,
    )


PRIVATE: tuple[Conflict, ...] = (
    *map(_alone, _OF_RUNS),
    Conflict(
        "zo_dp_max_c={zo_dp_max_c}",
        "zo_dp_noise_multiplier=None",
        "",
        "leave it out, or give zo_dp_noise_multiplier",
        lambda case: case.settings.dp_max_c is not None and not case.settings.is_private,
    ),
    _private(
        "zo_dp_max_c=None",
        "without a bound, one row could change a step by any amount",
        "set zo_dp_max_c to the usual size of a row's c",
        lambda case: case.settings.dp_max_c is None,
    ),
    _private(
        "zo_dp_target_epsilon={zo_dp_target_epsilon}",
        "without noise, epsilon is infinite",
        "leave it out, or use noise",
        lambda case: case.settings.dp_noise_multiplier == 0 and case.argument("zo_dp_target_epsilon") is not None,
    ),
    _private(
        "zo_estimator={zo_estimator}",
        "it does not bound what each row contributes",
        f"use zo_estimator={either(PRIVATE_ESTIMATORS)}",
        lambda case: case.settings.estimator not in PRIVATE_ESTIMATORS,
    ),
    _private(
        "zo_rule={zo_rule}",
        "the rule uses losses of the rows without noise",
        "use zo_rule='none'",
        lambda case: bool(case.settings.rule_kind.candidates) or case.settings.rule_kind.points > 1,
    ),
    _private(
        "zo_batched_probes=True",
        "rows are evaluated one probe at a time",
        "leave it out",
        lambda case: case.settings.batched_probes is True,
    ),
    _private(
        "zo_cuda_graph=True",
        "rows are evaluated one probe at a time",
        "leave it out",
        lambda case: case.settings.cuda_graph,
    ),
    _private("learning_rate='auto'", _LEAKS, "give a number", lambda case: case.argument("learning_rate") == "auto"),
    _private(
        "zo_stability_steps={zo_stability_steps}",
        _LEAKS,
        "leave it out",
        lambda case: bool(case.argument("zo_stability_steps")),
    ),
    _given(
        "zo_feature_cache_gib", "the fraction of layers that run reveals which rows were drawn before", "leave it out"
    ),
    _given("zo_max_time", "the duration of a step depends on its rows", "use max_steps, or zo_max_forward_passes"),
    _given("auto_find_batch_size", "running out of memory depends on the rows", "leave it out"),
    _given("include_num_input_tokens_seen", "it counts tokens of the rows without noise", "leave it out", "no"),
    _given("train_sampling_strategy", "the privacy guarantee needs Poisson sampling", "leave it out", "random"),
    _given("ignore_data_skip", "a resumed run would use rows that earlier steps have drawn", "leave it out"),
    _given("zo_parallel", "every process needs its own rows", "use zo_parallel='data'", "data"),
    _given("server_url", "servers do not give a loss for every row", "leave it out"),
    _private(
        "hub_strategy={hub_strategy}",
        "a checkpoint holds the secret that determines the noise",
        "use hub_strategy='every_save' or 'end'",
        lambda case: (
            bool(case.argument("push_to_hub"))
            and plain(case.argument("hub_strategy")) in ("checkpoint", "all_checkpoints")
        ),
    ),
    _private("fsdp=...", "this is not supported", "leave it out", lambda case: "fsdp" in case.facts),
    _private(
        "EvolutionTrainer",
        "a step compares all rewards of a population",
        "use ZOTrainer",
        lambda case: "population" in case.arguments,
    ),
)
