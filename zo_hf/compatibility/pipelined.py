"""Conflicts with a pipeline, in which each process holds some layers of the model."""

from __future__ import annotations

from collections.abc import Callable

from zo_hf.case import Case
from zo_hf.compatibility.conflict import Conflict
from zo_hf.subspaces import Full

_PIPELINE = "zo_parallel={zo_parallel} and zo_pipeline_stages={zo_pipeline_stages}"


def is_pipelined(case: Case) -> bool:
    """Return True if the processes of a run divide its layers among them."""
    stages = case.argument("zo_pipeline_stages")
    return case.argument("zo_parallel") == "pipeline" if stages in (None, "auto") else stages > 1


def _pipelined(that: str, why: str, instead: str, applies: Callable[[Case], bool]) -> Conflict:
    return Conflict(that, _PIPELINE, why, instead, lambda case: is_pipelined(case) and applies(case))


def _given(name: str, why: str, instead: str = "leave it out") -> Conflict:
    return _pipelined(f"{name}={{{name}}}", why, instead, lambda case: bool(case.argument(name)))


PIPELINED: tuple[Conflict, ...] = (
    _pipelined(
        "zo_subspace='full'",
        "every step would write every weight, and each process holds some",
        "use zo_subspace='low_rank', whose coordinates every process holds",
        lambda case: case.settings.subspace == Full.name,
    ),
    _pipelined(
        "zo_estimator={zo_estimator}",
        "activations cross the network without derivatives",
        "use zo_estimator='two_point'",
        lambda case: case.settings.estimator_kind.needs_tangents,
    ),
    _pipelined(
        "zo_basis='activation'",
        "every process would need the inputs of all layers",
        "use zo_basis='random'",
        lambda case: case.settings.basis == "activation",
    ),
    _pipelined(
        "zo_cuda_graph=True",
        "activations arrive and leave during the forward pass",
        "use zo_cuda_graph=False",
        lambda case: case.settings.cuda_graph,
    ),
    _pipelined(
        "zo_dp_noise_multiplier={zo_dp_noise_multiplier}",
        "every process would draw its own rows, and stages share a batch",
        "use zo_parallel='data' and zo_pipeline_stages='auto'",
        lambda case: case.settings.is_private,
    ),
    _pipelined(
        "fsdp=...",
        "both divide the weights, in different ways",
        "leave one of them out",
        lambda case: "fsdp" in case.facts,
    ),
    _pipelined(
        "a quantized model",
        "quantized layers cannot be divided",
        "load the model without quantization, or use zo_parallel='data'",
        lambda case: "quantized" in case.facts,
    ),
    _given("torch_compile", "a compiled model runs all of its layers"),
    _given("zo_feature_cache_gib", "the cache would replace layers of every process", "use zo_feature_cache_gib=0"),
    _given("save_only_trajectory", "the log is replayed by one process that holds all weights"),
    _given("save_on_each_node", "only the first process collects the weights"),
    _given(
        "fp16_full_eval", "it would make copies of weights that a process does not hold", "load the model in float16"
    ),
    _given(
        "bf16_full_eval", "it would make copies of weights that a process does not hold", "load the model in bfloat16"
    ),
    _given("eval_use_gather_object", "every stage would give the same rows"),
    _given("predict_with_generate", "generation needs a key-value cache of all layers", "evaluate the saved model"),
)
