"""Graphs of forward passes, recorded on the CPU: the bits of a run without them, in whatever order shapes and folds come."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import TinyTask, seeded, tiny_llama, tiny_opt
from tests.gpu.graph_runs import Run, padded
from tests.gpu.recorded_graph import RecordedGraph, recorded_graphs
from zo_hf import ZOConfig, ZOTrainer
from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation import pass_graphs
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.evaluation.pass_graphs import NotCapturable
from zo_hf.rng import draw as draws

BUILDS = {"opt": tiny_opt, "llama": tiny_llama}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes as a device to which operations are launched."""
    monkeypatch.setattr(draws, "is_launched", lambda device: True)


@pytest.fixture
def graphs() -> Iterator[list[RecordedGraph]]:
    with recorded_graphs() as made:
        yield made


def assert_same(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    mine, theirs = one.bits(), other.bits()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rows", [0, 1], ids="rows {}".format)
@pytest.mark.parametrize(
    ("build", "subspace"),
    [
        ("opt", "low_rank"),
        ("llama", "adapter"),
        *(
            pytest.param(build, subspace, marks=pytest.mark.slow)
            for build, subspace in (("llama", "low_rank"), ("opt", "core"), ("opt", "norms"), ("llama", "norms"))
        ),
    ],
)
def test_a_run_has_the_bits_of_one_without(
    build: str, subspace: str, rows: int, launched: None, graphs: list[RecordedGraph]
) -> None:
    """Through folds and evaluations, after which everything that a graph reads still lies where it was."""
    runs = [Run(BUILDS[build], graph, subspace, rows_per_direction=rows) for graph in (True, False)]
    for run in runs:
        for seed in range(5):
            run.step(seed)
            if seed % 2:
                run.evaluate()
    assert_same(*runs)
    # Core draws its bases anew elsewhere.
    assert sum(graph.replays for graph in graphs) == 5
    assert len(graphs) == (1 if subspace != "core" else 3)


def test_several_directions_and_a_rank_without_a_common_tensor(graphs: list[RecordedGraph]) -> None:
    """On a CPU, or for a rank that does not divide 128, layers read the coordinates one by one."""
    runs = [Run(tiny_opt, graph, num_directions=3) for graph in (True, False)]
    for run in runs:
        for seed in range(5):
            run.step(seed)
    assert_same(*runs)
    assert len(graphs) == 1


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(6, 8), min_size=1, max_size=6), most=st.integers(1, 3))
def test_shapes_in_any_order(lengths: list[int], most: int) -> None:
    with recorded_graphs() as graphs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "is_launched", lambda device: True)
        patch.setattr(pass_graphs, "MOST_GRAPHS", most)
        runs = [Run(tiny_llama, graph) for graph in (True, False)]
        for run in runs:
            for seed, length in enumerate(lengths):
                run.step(seed, length)
        assert_same(*runs)
        recent: list[int] = []
        captures = 0
        for length in lengths:
            captures += length not in recent
            recent = [*(other for other in recent if other != length), length][-most:]
        assert len(graphs) == captures


def test_many_shapes_are_warned_of_once(
    graphs: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pass_graphs, "MOST_GRAPHS", 1)
    run = Run(tiny_opt, True)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        for length in (6, 7, 6, 7):
            run.step(0, length)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [warning.split(",")[0] for warning in warnings] == ["batches have more than 1 shapes"]
    assert "which differ in attention_mask, input_ids, labels" in warnings[0]
    assert len(graphs) == 4


def test_the_warning_names_the_number_of_labeled_positions(
    graphs: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pass_graphs, "MOST_GRAPHS", 2)
    run = Run(tiny_opt, True)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        for labeled in (1, 2, 3):
            batch = padded(0, 8)
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, :-labeled] = -100
            loss = ModelLoss(run.model, run.inner, batch, lambda x: run.model(**x).loss, checks=run.checks)
            run.zo.estimate(loss)
            run.optimizer.step()
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "which differ in logits_to_keep, shift_labels, and" in warning
    assert "label equally many positions" in warning and len(graphs) == 3


def test_weights_that_are_written_in_place_are_read_and_those_that_are_replaced_are_captured_anew(
    launched: None, graphs: list[RecordedGraph]
) -> None:
    runs = [Run(tiny_llama, graph, exclude_modules=".*embed.*") for graph in (True, False)]
    for run in runs:
        embedding = run.inner.get_input_embeddings()
        run.step(0)
        with torch.no_grad():
            before = embedding.weight.clone()
            embedding.weight.fill_(float("inf"))
        run.step(1)
        assert run.zo.skipped_steps == 1
        with torch.no_grad():
            embedding.weight.copy_(before)
        run.step(2)
        embedding.weight = nn.Parameter(2 * before)
        run.step(3)
        run.model.lm_head.weight.data = run.model.lm_head.weight.data.clone()
        run.step(4)
    finite = [[value for value in run.losses if value == value] for run in runs]
    assert finite[0] == finite[1] and len(finite[0]) == 8
    assert len(graphs) == 3


def test_an_autocast_around_the_pass_leaves_no_weight_to_the_graph(
    launched: None, graphs: list[RecordedGraph]
) -> None:
    """Its copies of weights are given away at its end, and a fold would not reach them."""
    runs = [Run(tiny_opt, graph) for graph in (True, False)]
    for run in runs:
        for seed in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                run.step(seed)
            run.evaluate()
    assert_same(*runs)
    assert len(graphs) == 1


def test_a_model_on_several_devices_is_refused(graphs: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(pass_graphs, "computing_devices", lambda model: devices)
    match = r"^zo_cuda_graph=True captures what one device does, .* cuda:0, cuda:1; use zo_cuda_graph=False\.$"
    with pytest.raises(ValueError, match=match):
        Run(tiny_opt, True)


def test_a_device_without_graphs_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^zo_cuda_graph=True needs weights on a CUDA device, .* zo_cuda_graph=False"
    ):
        Run(tiny_opt, True)


def test_a_loss_of_unknown_inputs_is_refused(graphs: list[RecordedGraph]) -> None:
    class Own:
        rows = 4

        def __call__(self) -> Tensor:
            return torch.zeros(())

        def batched(self, copies: int) -> Tensor:
            return torch.zeros(copies)

    with pytest.raises(NotCapturable, match=r"needs the model's own loss.* use zo_cuda_graph=False"):
        Run(tiny_opt, True).zo.estimate(Own())
    # A loss of one number is no loss of several probes, and zo_batched_probes='auto' alone would be refused.
    with pytest.raises(NotBatchable, match=r"use zo_batched_probes='auto' and zo_cuda_graph=False\.$"):
        Run(tiny_opt, True).zo.estimate(lambda: torch.zeros(()))


@pytest.mark.parametrize("rows", [0, 1], ids="rows {}".format)
def test_a_forward_pass_that_waits_for_the_device_is_refused_and_nothing_has_moved(
    rows: int, graphs: list[RecordedGraph]
) -> None:
    run = Run(tiny_opt, True, rows_per_direction=rows)
    run.model.lm_head.register_forward_hook(lambda module, args, output: output * float(output.sum() != 0))
    before = run.bits()
    with pytest.raises(NotCapturable, match=r"cannot capture the forward pass .*capturing.*; use zo_cuda_graph=False"):
        run.step(0)
    assert run.zo.step == 0
    assert all(torch.equal(run.bits()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"zo_batched_probes": "auto"}, "use zo_batched_probes=True"),
        ({"zo_batched_probes": False}, "use zo_batched_probes=True"),
        ({"zo_subspace": "full"}, "use zo_subspace='low_rank'"),
        ({"zo_subspace": "scales"}, "use zo_subspace='low_rank'"),
        ({"zo_feature_cache_gib": 1.0}, "use zo_feature_cache_gib=0"),
        ({"torch_compile": True}, "leave one of them out"),
    ],
)
def test_what_does_not_combine(options: dict[str, Any], match: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^zo_cuda_graph=True does not combine with .*{match}"):
        ZOConfig(str(tmp_path), use_cpu=True, **{"zo_cuda_graph": True, "zo_batched_probes": True} | options)


@pytest.mark.parametrize("rows", [0, 1], ids="rows {}".format)
def test_trainer_with_accumulation(rows: int, launched: None, graphs: list[RecordedGraph], tmp_path) -> None:
    found = []
    for graph in (True, False):
        args = ZOConfig(
            str(tmp_path),
            use_cpu=True,
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_grad_norm=0.5,
            zo_fold_steps=2,
            zo_rows_per_direction=rows,
            zo_batched_probes=True,
            zo_cuda_graph=graph,
        )
        trainer = ZOTrainer(seeded(tiny_llama, attn_implementation="eager"), args, train_dataset=TinyTask(64))
        trainer.train()
        found.append((trainer.state.log_history[:-1], trainer.model.state_dict()))
    (logs, mine), (other_logs, theirs) = found
    assert [entry["loss"] for entry in logs] == [entry["loss"] for entry in other_logs]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(graphs) == 1 and graphs[0].replays == 8
