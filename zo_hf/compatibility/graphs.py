"""Conflicts with CUDA graphs of the forward pass, which repeat launches as they were captured."""

from __future__ import annotations

from zo_hf.compatibility.conflict import Conflict, rows_of

#: Subspaces whose coordinates at all probes lie in tensors before the forward pass begins.
CAPTURED = ("auto", "low_rank", "core", "norms", "adapter")


_graph = rows_of("zo_cuda_graph=True", lambda case: case.settings.cuda_graph)


GRAPHS: tuple[Conflict, ...] = (
    _graph(
        "zo_batched_probes={zo_batched_probes}",
        "the graph is that of one forward pass for all probes",
        "use zo_batched_probes=True",
        lambda case: case.settings.batched_probes is not True,
    ),
    _graph(
        "zo_subspace={zo_subspace}",
        "its forward pass takes numbers from the CPU, which a graph would freeze",
        "use zo_subspace='low_rank'",
        lambda case: case.settings.subspace not in CAPTURED,
    ),
    _graph(
        "zo_feature_cache_gib={zo_feature_cache_gib}",
        "the CPU decides for every batch which layers run",
        "use zo_feature_cache_gib=0",
        lambda case: bool(case.argument("zo_feature_cache_gib")),
    ),
    _graph(
        "torch_compile=True",
        "a compiled model may capture its own graphs",
        "leave one of them out",
        lambda case: bool(case.argument("torch_compile")),
    ),
    _graph(
        "a quantized model",
        "its layers may synchronize with the CPU",
        "use zo_cuda_graph=False",
        lambda case: bool({"quantized", "quantized layers"} & case.facts),
    ),
    _graph(
        "weights that device_map offloads",
        "the CPU loads them during the forward pass",
        "use zo_cuda_graph=False",
        lambda case: "offloaded" in case.facts,
    ),
    _graph(
        "fsdp=...",
        "processes exchange shards during the forward pass",
        "use zo_cuda_graph=False",
        lambda case: "fsdp" in case.facts,
    ),
    _graph(
        "server_url=...",
        "a server evaluates the model",
        "leave one of them out",
        lambda case: case.argument("server_url") is not None,
    ),
)
