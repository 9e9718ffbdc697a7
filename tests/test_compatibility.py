"""The table of what does not combine: every row refuses a run, in one sentence that names both sides and the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import config
from zo_hf.case import Case
from zo_hf.compatibility import CONFLICTS, Conflict, check
from zo_hf.estimators import ESTIMATORS
from zo_hf.settings import Settings
from zo_hf.subspaces import Full

COORDINATE, TANGENTS, TWO = {"estimator": "coordinate"}, {"estimator": "forward_gradient"}, {"num_directions": 2}
ROWS: dict[str, Any] = {"rows_per_direction": 1}
PIPELINE = {"zo_parallel": "pipeline", "zo_pipeline_stages": "auto"}
SERVED = {"server_url": "http://127.0.0.1:8000"}
INPUTS = {"preconditioner": "inputs"}
PRIVATE: dict[str, Any] = {"dp_noise_multiplier": 1.0, "dp_max_c": 1.0}
FULL, STABILITY = {"subspace": "full"}, {"zo_stability_steps": 10, "zo_stability_action": "warn"}

# (settings, arguments, facts): each is refused by one row, and together by all.
GRAPH = {"cuda_graph": True, "batched_probes": True}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    ({"cuda_graph": True}, {}, set()),
    (GRAPH | FULL, {}, set()),
    (GRAPH, {"zo_feature_cache_gib": 1.0}, set()),
    (GRAPH, {"torch_compile": True}, set()),
    (GRAPH, {}, {"quantized"}),
    (GRAPH, {}, {"offloaded"}),
    (GRAPH, {}, {"fsdp"}),
    (GRAPH, SERVED, set()),
    ({"rule": "conservative"} | FULL, {}, set()),
    ({"rule": "hizoo"}, {}, set()),
    ({"rule": "cocd"}, {}, set()),
    ({"rule": "svrg", "estimator": "fzoo"} | TWO, {}, set()),
    ({"momentum": 0.9}, {}, set()),
    ({"momentum_at_fold": "reset"}, {}, set()),
    ({"spectral_rank": 2}, {}, set()),
    ({"curvature_rate": 0.5}, {}, set()),
    ({"cocd_decay": 0.5}, {}, set()),
    ({"cocd_memory": 5}, {}, set()),
    ({"svrg_batches": 2}, {}, set()),
    ({"svrg_steps": 2}, {}, set()),
    ({"rule": "muon"}, {}, set()),
    (COORDINATE | {"direction": "sphere"}, {}, set()),
    ({"coordinate_order": "permuted"}, {}, set()),
    ({"active_layers": 0.5}, {}, set()),
    (TANGENTS | {"batched_probes": True}, {}, set()),
    (ROWS | COORDINATE, {}, set()),
    (ROWS | TWO | {"estimator": "evolution_ranks"}, {}, set()),
    (ROWS | {"direction": "orthogonal"}, {}, set()),
    (ROWS | {"direction": "adaptive_layers"}, {}, set()),
    (ROWS, {"zo_parallel": "directions"}, set()),
    (ROWS, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 10**6}, set()),
    ({"rule": "svrg", "direction": "layers"}, {}, set()),
    ({"rule": "muon", "direction": "sparse"} | TWO, {}, set()),
    (TANGENTS | FULL | {"direction": "layers"}, {}, set()),
    ({"estimator": "fzoo"} | TWO, STABILITY, set()),
    ({"rule": "sign"}, STABILITY, set()),
    ({"direction": "layers"}, STABILITY, set()),
    ({}, {"zo_stability_steps": 0, "zo_stability_action": "cap"}, set()),
    ({}, {"save_only_trajectory": True, "save_only_model": True}, set()),
    ({}, {"save_only_trajectory": True, "load_best_model_at_end": True}, set()),
    ({}, {"save_only_trajectory": True, "auto_find_batch_size": True}, set()),
    ({"rule": "conservative"}, {"max_grad_norm": 1.0}, set()),
    ({}, {"neftune_noise_alpha": 5.0}, set()),
    ({}, {"deepspeed": "ds.json"}, set()),
    ({}, {"parallelism_config": SimpleNamespace(cp_size=2)}, set()),
    ({}, {"activation_checkpointing": True}, set()),
    ({}, {"gradient_checkpointing": True}, set()),
    ({}, {"optim": "lomo"}, set()),
    ({}, {"optim": "schedule_free_sgd"}, set()),
    (COORDINATE | {"rule": "cocd"}, {"optim": "adamw_torch"}, set()),
    (FULL, {"optim": "adamw_torch"}, set()),
    (FULL, {"optim": "sgd", "optim_args": "momentum=0.9"}, set()),
    ({"estimator": "fzoo"} | TWO, {"learning_rate": "auto"}, set()),
    ({"rule": "muon"} | TWO, {"learning_rate": "auto"}, set()),
    ({}, {"learning_rate": "auto", "max_grad_norm": 1.0}, set()),
    ({}, {"learning_rate": "auto"}, {"fsdp"}),
    ({}, {"learning_rate": "auto"}, {"optimizers"}),
    ({}, {"learning_rate": "auto"}, {"create_optimizer"}),
    ({}, {"learning_rate": "auto"}, {"own rates"}),
    ({}, {}, {"schedule-free"}),
    (TANGENTS, {"torch_compile": True}, set()),
    (TANGENTS, {}, {"fsdp"}),
    (FULL, {}, {"fsdp"}),
    ({}, {"auto_find_batch_size": True}, {"fsdp"}),
    ({}, {"zo_feature_cache_gib": 1.0}, {"fsdp"}),
    ({}, {"zo_feature_cache_gib": 1.0, "torch_compile": True}, set()),
    ({}, {"torch_compile": True}, {"fsdp"}),
    ({}, {"save_only_trajectory": True}, {"fsdp"}),
    ({}, {}, {"fsdp", "optimizers"}),
    ({}, {}, {"fsdp", "create_optimizer"}),
    (FULL, {}, {"optimizers"}),
    (FULL, {}, {"create_optimizer"}),
    (FULL, {}, {"optimizer_cls_and_kwargs"}),
    (FULL, {}, {"another class"}),
    ({"subspace": "core", "basis": "activation"}, {}, set()),
    ({"subspace": "norms", "fold_rounding": "gptq"}, {}, set()),
    ({"basis": "activation"}, {}, {"fsdp"}),
    (INPUTS | FULL, {}, set()),
    (INPUTS | {"basis": "activation"}, {}, set()),
    (INPUTS | {"rule": "curvature", "estimator": "second_difference"}, {}, set()),
    (INPUTS | COORDINATE, {}, set()),
    (INPUTS, STABILITY, set()),
    (INPUTS, {"learning_rate": "auto"}, set()),
    (INPUTS, {}, {"fsdp"}),
    (INPUTS, PIPELINE, set()),
    ({"subspace": "core"}, {}, {"adapter on a quantized model"}),
    (FULL, {}, {"quantized"}),
    ({}, {"torch_compile": True}, {"quantized"}),
    ({}, {}, {"quantized", "fsdp"}),
    (FULL, {}, {"offloaded"}),
    ({}, {}, {"offloaded", "quantized"}),
    ({}, {"torch_compile": True}, {"offloaded"}),
    ({}, {}, {"offloaded", "fsdp"}),
    ({}, {}, {"offloaded", "several processes"}),
    (FULL, PIPELINE, set()),
    (TANGENTS, PIPELINE, set()),
    (TANGENTS, {"zo_parallel": "data", "zo_pipeline_stages": 2}, set()),
    ({"basis": "activation"}, PIPELINE, set()),
    (GRAPH, PIPELINE, set()),
    (PRIVATE, {"zo_parallel": "data", "zo_pipeline_stages": 2}, set()),
    ({}, PIPELINE, {"fsdp"}),
    ({}, PIPELINE, {"quantized"}),
    ({}, PIPELINE | {"torch_compile": True}, set()),
    ({}, PIPELINE | {"zo_feature_cache_gib": 1.0}, set()),
    ({}, PIPELINE | {"save_only_trajectory": True}, set()),
    ({}, PIPELINE | {"save_on_each_node": True}, set()),
    ({}, PIPELINE | {"fp16_full_eval": True}, set()),
    ({}, PIPELINE | {"bf16_full_eval": True}, set()),
    ({}, PIPELINE | {"eval_use_gather_object": True}, set()),
    ({}, PIPELINE | {"predict_with_generate": True}, set()),
    ({}, {"server_url": None, "server_folder": "/tmp"}, set()),
    ({"subspace": "low_rank"}, SERVED, set()),
    (ROWS, SERVED, set()),
    (TANGENTS, SERVED, set()),
    ({"batched_probes": True}, SERVED, set()),
    ({}, SERVED | {"zo_parallel": "directions"}, set()),
    ({}, SERVED | {"learning_rate": "auto"}, set()),
    ({}, SERVED | {"zo_stability_steps": 5}, set()),
    ({}, SERVED | {"zo_feature_cache_gib": 1.0}, set()),
    ({}, SERVED | {"torch_compile": True}, set()),
    ({}, SERVED | {"generation_kwargs": "of JSON"}, set()),
    ({}, SERVED | {"cache_implementation": "static"}, set()),
    ({}, {"zo_dp_delta": 1e-5}, set()),
    ({}, {"zo_dp_target_epsilon": 1.0}, set()),
    ({"dp_max_c": 1.0}, {}, set()),
    ({"dp_noise_multiplier": 1.0}, {}, set()),
    (PRIVATE, {"ignore_data_skip": True}, set()),
    (PRIVATE | {"dp_noise_multiplier": 0.0}, {"zo_dp_target_epsilon": 1.0}, set()),
    (PRIVATE | {"estimator": "fzoo"} | TWO, {}, set()),
    (PRIVATE | {"rule": "svrg"}, {}, set()),
    (PRIVATE | {"batched_probes": True}, {}, set()),
    (PRIVATE | {"cuda_graph": True}, {}, set()),
    (PRIVATE, {"learning_rate": "auto"}, set()),
    (PRIVATE, STABILITY, set()),
    (PRIVATE, {"zo_feature_cache_gib": 1.0}, set()),
    (PRIVATE, {"zo_max_time": 60.0}, set()),
    (PRIVATE, {"auto_find_batch_size": True}, set()),
    (PRIVATE, {"include_num_input_tokens_seen": "all"}, set()),
    (PRIVATE, {"train_sampling_strategy": "group_by_length"}, set()),
    (PRIVATE, {"zo_parallel": "directions"}, set()),
    (PRIVATE, {"server_url": "http://127.0.0.1:8000", "zo_parallel": None}, set()),
    (PRIVATE, {"push_to_hub": True, "hub_strategy": "all_checkpoints"}, set()),
    (PRIVATE, {}, {"fsdp"}),
    (PRIVATE, {"population": 16}, set()),
]


def case_of(settings: dict[str, Any], arguments: dict[str, Any], facts: set[str]) -> Case:
    return Case(Settings(**settings), arguments, frozenset(facts))


def first_conflict(case: Case) -> Conflict:
    return next(conflict for conflict in CONFLICTS if conflict.applies(case))


@pytest.mark.parametrize(("settings", "arguments", "facts"), REFUSED, ids=range(len(REFUSED)))
def test_a_refusal_is_one_sentence_about_both_sides(
    settings: dict[str, Any], arguments: dict[str, Any], facts: set[str]
) -> None:
    case = case_of(settings, arguments, facts)
    with pytest.raises(ValueError) as refusal:
        check(case)
    message = str(refusal.value).replace("=...", "")
    assert message.count(". ") == 0 and message.endswith(".") and ("; " in message) and "{" not in message
    assert " does not combine with " in message or " has no effect with " in message
    for name, value in arguments.items():
        if name not in ("zo_stability_action", "optim") and value not in (0, False):
            assert name in message or any(option in message for option in arguments), message


def test_a_subspace_that_exists_already_is_refused_for_a_graph_as_one_that_is_named() -> None:
    case = Case(Settings(**GRAPH, subspace="scales"), subspace=Full(seeded(tiny_opt)))
    with pytest.raises(ValueError, match=r"^zo_cuda_graph=True does not combine with zo_subspace='scales'"):
        check(case)


def test_every_row_refuses_something() -> None:
    reached = [first_conflict(case_of(*refused)) for refused in REFUSED]
    only_with_a_made_subspace = {conflict.that for conflict in CONFLICTS} & {"a Full subspace"}
    # Rows of options that have no effect follow from the registries; the others are written by hand.
    missing = [
        (c.this, c.that) for c in CONFLICTS if c.why and c not in reached and c.that not in only_with_a_made_subspace
    ]
    assert not missing and len(only_with_a_made_subspace) == 1


def test_a_made_subspace_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"zo_estimator='coordinate' does not combine with a Full subspace"):
        check(Case(Settings(estimator="coordinate"), subspace=Full(seeded(tiny_opt))))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_plain_run_has_no_conflict(tmp_path: Path, estimator: str) -> None:
    args = config(tmp_path, zo_estimator=estimator, zo_num_directions=2)
    check(Case(args.settings(), vars(args)))


def test_three_ways_out_are_joined_with_commas(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"; use zo_estimator='two_point', 'second_difference' or 'one_sided', or leave "
    ):
        config(tmp_path, zo_estimator="fzoo", zo_num_directions=2, zo_stability_steps=10)
