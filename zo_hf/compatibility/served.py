"""Options that do not combine with servers that evaluate the model, and those that have no effect without them."""

from __future__ import annotations

from zo_hf.compatibility.conflict import Conflict, rows_of

#: Options of servers, with their defaults.
_OF_SERVERS = {"server_max_loras": 8, "server_folder": None, "server_timeout": 600.0}


_served = rows_of("server_url=...", lambda case: case.argument("server_url") is not None)


def _given(name: str, why: str, instead: str = "leave it out") -> Conflict:
    return _served(f"{name}={{{name}}}", why, instead, lambda case: bool(case.argument(name)))


def _alone(name: str, default: object) -> Conflict:
    return Conflict(
        f"{name}={{{name}}}",
        "server_url=None",
        "",
        "leave it out, or give server_url",
        lambda case: name in case.arguments and case.argument("server_url") is None and case.argument(name) != default,
    )


SERVED: tuple[Conflict, ...] = (
    *(_alone(name, default) for name, default in _OF_SERVERS.items()),
    _served(
        "zo_subspace={zo_subspace}",
        "servers hold only LoRA adapters",
        "use zo_subspace='adapter', with a PEFT model",
        lambda case: case.settings.subspace not in ("auto", "adapter"),
    ),
    _served(
        "zo_rows_per_direction={zo_rows_per_direction}",
        "every row would need two adapters on the servers",
        "use zo_rows_per_direction=0, and zo_num_directions for a population",
        lambda case: case.settings.rows_per_direction not in (0, "auto"),
    ),
    _served(
        "zo_estimator={zo_estimator}",
        "servers give losses, but no derivatives",
        "use zo_estimator='two_point'",
        lambda case: case.settings.estimator_kind.needs_tangents,
    ),
    _served(
        "zo_batched_probes=True",
        "the servers decide which requests share a batch",
        "leave it out",
        lambda case: case.settings.batched_probes is True,
    ),
    _served(
        "zo_parallel={zo_parallel}",
        "a single process uses all servers",
        "leave it out, and set server_url to a list",
        lambda case: case.argument("zo_parallel") not in (None, "data"),
    ),
    _served(
        "learning_rate='auto'",
        "the search evaluates losses in this process",
        "give a number, or leave learning_rate out for the default",
        lambda case: case.argument("learning_rate") == "auto",
    ),
    _given("zo_stability_steps", "the curvature is measured in this process"),
    _given("zo_feature_cache_gib", "the cache serves forward passes of this process"),
    _given("torch_compile", "the servers compile the model as they were started"),
    _given("generation_kwargs", "a server takes only the options of EvolutionConfig"),
    _given("cache_implementation", "the servers have their own cache"),
)
