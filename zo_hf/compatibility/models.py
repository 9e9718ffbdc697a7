"""Conflicts of methods and arguments with the model, its shards and the user's optimizer."""

from __future__ import annotations

from zo_hf.compatibility.conflict import Conflict, with_argument
from zo_hf.compatibility.optimizers import MADE_BY_USER, has_no_gradient, users_optimizers
from zo_hf.subspaces import Core, Full, LowRank

MODELS: tuple[Conflict, ...] = (
    Conflict(
        "fsdp=...",
        "zo_estimator={zo_estimator}",
        "the estimator needs whole weights for its derivatives",
        "use zo_estimator='two_point'",
        lambda case: "fsdp" in case.facts and case.settings.estimator_kind.needs_tangents,
    ),
    Conflict(
        "fsdp=...",
        "zo_subspace='full'",
        "noise would be drawn for weights that other processes hold",
        "use zo_subspace='low_rank'",
        lambda case: "fsdp" in case.facts and case.settings.subspace == Full.name,
    ),
    Conflict(
        "zo_feature_cache_gib={zo_feature_cache_gib}",
        "fsdp=...",
        "processes gather weights together, and with a cache they run different layers",
        "use zo_feature_cache_gib=0",
        lambda case: bool(case.argument("zo_feature_cache_gib")) and "fsdp" in case.facts,
    ),
    Conflict(
        "zo_feature_cache_gib={zo_feature_cache_gib}",
        "torch_compile=True",
        "a compiled model runs all of its layers",
        "use zo_feature_cache_gib=0",
        lambda case: bool(case.argument("zo_feature_cache_gib")) and bool(case.argument("torch_compile")),
    ),
    *(
        with_argument("fsdp=...", name, "this is not supported", lambda case: "fsdp" in case.facts)
        for name in ("auto_find_batch_size", "torch_compile", "save_only_trajectory")
    ),
    *users_optimizers(
        "fsdp=...",
        "the optimizer holds the model's parameters, which FSDP replaces by shards",
        "use optim=... or optimizer_cls_and_kwargs=..., which get the coordinates",
        lambda case: "fsdp" in case.facts,
    ),
    *users_optimizers(
        "zo_subspace='full'",
        "it needs gradients, which this subspace never holds",
        "leave it out, or use zo_subspace='low_rank'",
        has_no_gradient,
        MADE_BY_USER
        | {
            "optimizer_cls_and_kwargs": "optimizer_cls_and_kwargs=...",
            "another class": "an optimizer named by get_optimizer_cls_and_kwargs",
        },
    ),
    Conflict(
        "zo_basis='activation'",
        "zo_subspace={zo_subspace}",
        "",
        "use zo_subspace='low_rank', or leave zo_basis out",
        lambda case: case.settings.basis == "activation" and case.settings.subspace not in ("auto", LowRank.name),
    ),
    Conflict(
        "zo_fold_rounding='gptq'",
        "zo_subspace={zo_subspace}",
        "",
        "use zo_subspace='low_rank', or leave zo_fold_rounding out",
        lambda case: (
            case.settings.fold_rounding == "gptq" and case.settings.subspace not in ("auto", LowRank.name, Core.name)
        ),
    ),
    Conflict(
        "zo_basis='activation'",
        "fsdp=...",
        "every process would gather all weights for an extra forward pass",
        "use zo_basis='random'",
        lambda case: case.settings.basis == "activation" and "fsdp" in case.facts,
    ),
    Conflict(
        "zo_subspace={zo_subspace}",
        "a quantized model that has an adapter",
        "the quantized base of an adapter cannot move",
        "use zo_subspace='adapter', which trains the adapter",
        lambda case: "adapter on a quantized model" in case.facts and case.settings.subspace in ("low_rank", "core"),
    ),
    Conflict(
        "zo_subspace='full'",
        "a quantized model",
        "its steps are too small for a quantized weight to represent",
        "use zo_subspace='low_rank', whose factors stay apart from the weights",
        lambda case: "quantized" in case.facts and case.settings.subspace == Full.name,
    ),
    Conflict(
        "torch_compile=True",
        "a quantized model",
        "its layers cannot be compiled",
        "leave it out",
        lambda case: "quantized" in case.facts and bool(case.argument("torch_compile")),
    ),
    Conflict(
        "fsdp=...",
        "a quantized model",
        "quantized weights cannot be sharded",
        "load the model with a device_map, or without quantization",
        lambda case: {"fsdp", "quantized"} <= case.facts,
    ),
)
