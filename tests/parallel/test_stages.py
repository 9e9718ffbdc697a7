"""The stages of a pipeline in this process: who holds what, and forward passes through stages that run one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import MPNetConfig, MPNetForSequenceClassification, T5Config, T5EncoderModel

from tests.conftest import causal_batch, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5
from tests.trainer.runs import config, make_trainer
from tests.trainer.test_refusals import refused
from zo_hf.estimators import TwoPoint
from zo_hf.evaluation.layer_stack import single_stack
from zo_hf.evaluation.passed_on import PassedOn, loss_or_zeros
from zo_hf.evaluation.pipeline import Stage
from zo_hf.parallel.absent import first_holder, has_absent, is_absent, let_go, note_holder
from zo_hf.parallel.ranks import Grid, Ranks, ReplicasDiffer, make_grid, share_batches
from zo_hf.subspaces import LowRank
from zo_hf.trainer.pipeline import Pipeline, divided

CPU = torch.device("cpu")
LAYERS = 5


def deep(build: Callable[..., nn.Module], layers: int = LAYERS) -> nn.Module:
    return seeded(build, **{"n_layer" if build is tiny_gpt2 else "num_hidden_layers": layers})


class Queue:
    """A channel whose other ends are in this process, and run when this one has ended."""

    def __init__(self, before: deque[Tensor], after: deque[Tensor], is_last: bool) -> None:
        self._before, self._after, self.is_last = before, after, is_last
        self.in_tuple = False

    def send(self, hidden: Tensor, in_tuple: bool, described: bool) -> None:
        self._after.append(hidden.clone())

    def receive(self, like: Tensor, described: bool, ahead: bool = False) -> Tensor:
        hidden = self._before.popleft()
        assert hidden.shape == like.shape
        return hidden

    def share(self, outputs: Any) -> Any:
        raise AssertionError("a pass that streams gives no outputs")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes that have the same weights already, and no connections."""
    monkeypatch.setattr(Pipeline, "_make_equal", lambda *_: None)
    monkeypatch.setattr("zo_hf.trainer.pipeline.Channel", lambda *_: Queue(deque(), deque(), True))
    return


@given(st.integers(1, 200), st.integers(1, 64))
def test_every_layer_has_one_stage_and_stages_differ_by_one_layer_at_most(layers: int, stages: int) -> None:
    if layers < stages:
        return
    parts = divided(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers)) and len(parts) == stages
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@settings(deadline=None)  # the first call is slow on a busy machine
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_losses_are_those_of_last_stages(data: int, directions: int, stages: int, each: int, seed: int) -> None:
    probes = TwoPoint(1e-3, directions * each).probes()
    table = torch.rand(data, len(probes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grids = [Grid(data, directions, rank, stages) for rank in range(data * directions * stages)]
    places = [(grid.data_index, grid.direction_index, grid.stage) for grid in grids]
    assert places == [(d, q, s) for d in range(data) for q in range(directions) for s in range(stages)]
    rows = [table[grid.data_index, grid.own(probes)] for grid in grids]
    gathered = torch.stack(
        [row if grid.stage == stages - 1 else torch.zeros_like(row) for grid, row in zip(grids, rows, strict=True)]
    )
    for grid in grids:
        torch.testing.assert_close(grid.mean_losses(gathered, probes), table.mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("parallel", "world_size", "stages", "shape"),
    [
        ("pipeline", 4, "auto", (1, 1, 4)),
        ("pipeline", 4, 2, (2, 1, 2)),
        ("data", 6, 3, (2, 1, 3)),
        ("directions", 4, 2, (1, 2, 2)),
        ("both", 8, 2, (2, 2, 2)),
        ("data", 4, "auto", (4, 1, 1)),
        ("pipeline", 1, "auto", (1, 1, 1)),
    ],
)
def test_pipelines_take_the_places_of_ranks(
    parallel: str, world_size: int, stages: int | str, shape: tuple[int, int, int]
) -> None:
    grid = make_grid(parallel, world_size, 0, 2, stages)
    assert (grid.data, grid.directions, grid.stages) == shape and grid.world_size == world_size


def test_processes_that_make_no_equal_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match="zo_pipeline_stages=3 cannot divide 4 processes"):
        make_grid("pipeline", 4, 0, 1, 3)


def test_an_absent_weight_keeps_its_ties_and_takes_no_memory() -> None:
    model = seeded(tiny_opt)
    weight = model.get_input_embeddings().weight
    note_holder(weight, 1)
    assert not is_absent(weight) and first_holder(weight) == 1
    shape = weight.shape
    let_go(weight, CPU)
    assert model.lm_head.weight is weight and weight.shape == shape
    assert is_absent(weight) and weight.untyped_storage().nbytes() == weight.element_size()
    assert bool(model.get_input_embeddings()(torch.tensor([3])).isnan().all())


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2, tiny_mixtral])
def test_stages_hold_every_weight_and_each_layer_once(build: Callable[..., nn.Module], alone: None) -> None:
    stages = 3
    held: list[set[str]] = []
    for rank in range(stages):
        model = deep(build)
        Pipeline(Ranks(Grid(rank=rank, stages=stages)), CPU, 1.0).shard(model, adapter=False)
        assert has_absent(model)
        held.append({name for name, p in model.named_parameters() if not is_absent(p)})
        state = model.state_dict()
        assert all(state[name].is_meta == is_absent(p) for name, p in model.named_parameters())
    names = {name for name, _ in model.named_parameters()}
    assert set.union(*held) == names
    layers = {name for name in names if ".layers." in name or ".h." in name}
    assert sum(len(own & layers) for own in held) == len(layers)
    assert all(own & layers for own in held)


def stages_of(build: Callable[..., nn.Module], count: int) -> list[tuple[nn.Module, Stage]]:
    """Models whose stages give each other activations through queues."""
    queues: list[deque[Tensor]] = [deque() for _ in range(count + 1)]
    found = []
    for index, part in enumerate(divided(LAYERS, count)):
        model = deep(build)
        _, layers = single_stack(model, "", "")
        channel: Any = Queue(queues[index], queues[index + 1], index == count - 1)
        found.append((model, Stage(model, layers, part, channel)))
    return found


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2, tiny_mixtral, tiny_bert])
def test_passes_that_stream_give_the_bits_of_the_whole_model(build: Callable[..., nn.Module]) -> None:
    batches = [causal_batch(seed=seed) for seed in range(3)]
    if build is tiny_bert:
        batches = [batch | {"labels": batch["labels"][:, -1] % 2} for batch in batches]
    with torch.no_grad():
        expected = [deep(build)(**batch).loss for batch in batches]
        stages = stages_of(build, 3)
        for model, stage in stages[:-1]:  # a whole step streams through a stage before the next one begins
            with stage.streaming():
                for batch in batches:
                    with pytest.raises(PassedOn):
                        model(**batch)
        model, last = stages[-1]
        with last.streaming():
            actual = [model(**batch).loss for batch in batches]
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    assert not any(stage.has_failed for _, stage in stages)


def test_a_pass_that_fails_among_the_layers_is_noted() -> None:
    model, stage = stages_of(tiny_llama, 2)[0]

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    model.model.layers[0].register_forward_hook(fail)
    with torch.no_grad(), stage.streaming(), pytest.raises(RuntimeError, match="no memory"):
        model(**causal_batch())
    assert stage.has_failed


def test_a_stage_without_memory_says_what_to_set() -> None:
    model, stage = stages_of(tiny_llama, 2)[0]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    model.model.layers[0].register_forward_hook(fail)
    with torch.no_grad(), stage.streaming(), pytest.raises(torch.OutOfMemoryError) as raised:
        model(**causal_batch())
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB); set zo_batched_probes=False" in str(raised.value)
    assert stage.has_failed


def test_a_pass_that_fails_before_the_layers_leaves_the_stages_together() -> None:
    model, stage = stages_of(tiny_llama, 2)[0]
    with torch.no_grad(), stage.streaming(), pytest.raises(ValueError):
        model(input_ids=None)
    assert not stage.has_failed


def test_zeros_stand_for_a_loss_that_a_later_stage_computes() -> None:
    def passed_on() -> Tensor:
        raise PassedOn

    zeros = loss_or_zeros(passed_on, (2, 3), torch.bfloat16, CPU)
    assert zeros.shape == (2, 3) and zeros.dtype == torch.bfloat16 and not bool(zeros.any())
    assert loss_or_zeros(lambda: torch.ones(()), (), torch.float32, CPU) == 1


def test_a_fold_leaves_absent_weights_alone(alone: None) -> None:
    model, whole = deep(tiny_llama), deep(tiny_llama)
    Pipeline(Ranks(Grid(rank=1, stages=2)), CPU, 1.0).shard(model, adapter=False)
    after = []
    for each in (model, whole):
        subspace = LowRank(each, seed=1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for coordinate in subspace.coordinates.values():
                coordinate.copy_(torch.randn(coordinate.shape, generator=generator))
        subspace.fold(3, {})
        after.append(dict(each.named_parameters()))
    held = {name for name, p in after[0].items() if not is_absent(p)}
    assert 0 < len(held) < len(after[0])
    assert all(torch.equal(after[0][name], after[1][name]) for name in held)


class Others(Ranks):
    """Ranks of which the others hold what they are given."""

    def __init__(self, grid: Grid, others: Tensor) -> None:
        super().__init__(grid)
        self._others = others

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, *self._others])


def test_weights_are_compared_among_the_stages_that_hold_them() -> None:
    def sums_of(own: int) -> Tensor:
        sent: list[Tensor] = []

        class Sent(Ranks):
            def all_gather(self, tensor: Tensor) -> Tensor:
                sent.append(tensor)
                return tensor[None]

        Sent(Grid(stages=2)).check_replicas({"b": torch.ones(2)}, weights(own), None, 0)
        return sent[0]

    def weights(own: int, value: float = 1.0) -> dict[str, nn.Parameter]:
        named = {f"w{index}": nn.Parameter(torch.full((4,), value + index)) for index in range(2)}
        for index, parameter in enumerate(named.values()):
            note_holder(parameter, index)
            if index != own:
                let_go(parameter, CPU)
        return named

    grid = Grid(data=2, stages=2)  # ranks 0 and 2 hold w0, ranks 1 and 3 hold w1
    others = torch.stack([sums_of(1), sums_of(0), sums_of(1)])
    Others(grid, others).check_replicas({"b": torch.ones(2)}, weights(0), None, step=3)
    with pytest.raises(ReplicasDiffer, match=r"at step 3 rank 2 of 4 differs from the rest, first in w0;"):
        Others(grid, others).check_replicas({"b": torch.ones(2)}, weights(0, value=2.0), None, step=3)


@pytest.mark.parametrize(
    ("build", "layers", "why"),
    [
        (tiny_t5, 2, "has an encoder and a decoder"),
        (tiny_llama, 1, "cannot divide 1 layers among 2 stages; set zo_pipeline_stages=1 or fewer"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(build: Callable[..., nn.Module], layers: int, why: str) -> None:
    pipeline = Pipeline(Ranks(Grid(stages=2)), CPU, 1.0)
    model = seeded(build) if build is tiny_t5 else deep(build, layers)
    with pytest.raises(ValueError, match=why) as refusal:
        pipeline.layers_of(model)
    assert "zo_parallel='pipeline'" in str(refusal.value)


def test_stages_are_a_whole_number_or_auto(tmp_path: Any) -> None:
    assert config(tmp_path, zo_pipeline_stages="2").zo_pipeline_stages == 2
    assert config(tmp_path, zo_pipeline_stages=None).zo_pipeline_stages == "auto"
    refused("zo_pipeline_stages", lambda: config(tmp_path, zo_pipeline_stages=0))
    refused("zo_pipeline_stages", lambda: config(tmp_path, zo_pipeline_stages="two"))


def test_a_model_that_another_trainer_has_divided_is_refused(tmp_path: Any, alone: None) -> None:
    model = deep(tiny_llama)
    Pipeline(Ranks(Grid(stages=2)), CPU, 1.0).shard(model, adapter=False)
    refused("another trainer has divided", lambda: make_trainer(tmp_path, model))


def mpnet() -> nn.Module:
    """Its layers get a position bias, which is made of weights beside them."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    return MPNetForSequenceClassification(MPNetConfig(num_hidden_layers=3, num_attention_heads=4, **shape)).eval()


def t5_encoder() -> nn.Module:
    """Its first layer gives the others a position bias."""
    return T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)).eval()


@pytest.mark.parametrize(
    ("build", "why"),
    [(mpnet, "read weights outside of the layers"), (t5_encoder, "return more than hidden states")],
)
def test_layers_that_need_more_than_hidden_states_are_refused_at_the_first_pass(
    alone: None, build: Callable[[], nn.Module], why: str
) -> None:
    model = build()
    pipeline = Pipeline(Ranks(Grid(rank=1, stages=3)), CPU, 1.0)
    pipeline.shard(model, adapter=False)
    assert pipeline.stage is not None
    channel: Any = Queue(deque([torch.zeros(2, 4, 32)]), deque(), False)
    channel.in_tuple, pipeline.stage._channel = True, channel
    ids = torch.full((2, 4), 5)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=f"cannot divide the layers of {type(model).__name__}, which {why}"),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_dataloader_that_is_shared_already_stays_as_it_is() -> None:
    """Trainer keeps that of an evaluation with persistent workers, and returns it again."""
    sampler = BatchSamplerShard(BatchSampler(range(8), 2, False), num_processes=4, process_index=3)
    loader = DataLoader(range(8), batch_sampler=sampler)  # type: ignore[arg-type]
    for _ in range(2):
        share_batches(loader, Grid(data=2, stages=2, rank=3), 2)
        assert (sampler.num_processes, sampler.process_index) == (2, 1)
