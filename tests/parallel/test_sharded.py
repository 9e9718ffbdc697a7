"""Weights sharded by FSDP2: the run of one process that sees the same micro-batches, on processes that hold shards.

Two processes, as `accelerate launch --use_fsdp --fsdp_version 2` and as `fsdp=True` set them up; and three, over which
no weight divides evenly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import (
    TinyTask,
    assert_same_bits,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    weights_of,
)
from tests.parallel.launch import run
from tests.trainer.runs import At, SaveAt, logged, make_trainer, with_lora
from tests.trainer.test_refusals import refused
from zo_hf import ZOTrainer
from zo_hf.estimators.probe import NotBatchable
from zo_hf.parallel.shards import gathered_state_dict, is_sharded, local_part
from zo_hf.subspaces import LowRank
from zo_hf.trajectory import replay

OPTIONS = {"max_steps": 20, "learning_rate": 1e-4, "zo_eps": 1e-2, "zo_fold_steps": 6, "zo_rows_per_direction": 0}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
ROWS = 12  # of a step's batch, over all processes

# The tiny OPT and GPT-2 tie their head to the embedding, the others do not; GPT-2 stores weights (in, out).
RUNS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "opt": (tiny_opt, {}),
    "llama in bfloat16": (tiny_llama, {"dtype": torch.bfloat16}),
    "gpt2": (tiny_gpt2, {}),
    "mixtral": (tiny_mixtral, {}),
    "adapter": (tiny_opt, {}),
    "rows": (tiny_opt, {}),  # with a direction for every row
}
WHOLE = [name for name in RUNS if name != "adapter"]
RUNS_OF_TWO = ("opt", "llama in bfloat16", "adapter", "rows")


def model_of(name: str, seed: int = 0) -> nn.Module:
    build, options = RUNS[name]
    model = seeded(build, seed=seed, **options)
    return with_lora(model) if name == "adapter" else model


def rows_of(name: str) -> dict[str, Any]:
    return {"zo_rows_per_direction": 1} if name == "rows" else {}


def trainer_of(folder: Path, model: nn.Module, processes: int = 1, accumulate: int = 1, **options: Any) -> ZOTrainer:
    """A trainer whose steps see the same rows, however many processes or micro-batches share them."""
    more = {"train_dataset": TinyTask(5 * ROWS), "eval_dataset": TinyTask(12)} | options.pop("more", {})
    rows = {"per_device_train_batch_size": ROWS // processes // accumulate, "per_device_eval_batch_size": 2}
    rows |= {"gradient_accumulation_steps": accumulate}
    return make_trainer(folder, model, more=more, **OPTIONS | rows | options)


class Mine(At):
    """Notes a process's coordinates after every step."""

    def __init__(self) -> None:
        super().__init__(None, lambda state, **kwargs: self.coordinates())
        self.trainer: Any = None

    def coordinates(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.trainer.zo.subspace.coordinates.values()])


def main() -> None:
    """The work of each of the launched processes."""
    folder, rank, processes = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if processes == 3:
        as_on_gpus()
    for name in RUNS_OF_TWO if processes == 2 else RUNS:
        notes = Mine()
        seen = At({9}, lambda state, model, **_: {key: whole(tensor) for key, tensor in model.state_dict().items()})
        options: dict[str, Any] = {"more": {"callbacks": [notes, seen, SaveAt(9)]}}
        if "bfloat16" in name and processes == 2:  # asked for in the arguments
            for variable in FSDP:
                del os.environ[variable]
            options |= {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}
        model = first_process_only(name) if name == "gpt2" else model_of(name, rank)
        trainer = notes.trainer = trainer_of(folder / name, model, processes, **options | rows_of(name))
        result: dict[str, Any] = {"eval_loss": trainer.evaluate()["eval_loss"]}
        trainer.train()
        os.environ.update(FSDP)
        result |= {"coordinates": torch.stack(notes.results), "weights": gathered_state_dict(trainer.model)}
        result |= {key: logged(trainer, key) for key in ("loss", "zo/forward_passes")}
        result["seen"] = seen.results[0]
        held = {key: (local_part(p)[0], is_sharded(p)) for key, p in trainer.model.named_parameters()}
        result["shapes"] = {key: part.shape for key, (part, sharded) in held.items() if sharded}
        result["whole"] = [key for key, (_, sharded) in held.items() if not sharded]
        result["trained eval_loss"] = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(folder / name / "final"))
        if name in ("opt", "adapter", "rows"):  # killed after step 9, between two folds, and resumed
            seed = rank if name == "adapter" else rank + 5  # a checkpoint of an adapter does not hold the base
            again = trainer_of(folder / name, model_of(name, seed), processes, **rows_of(name))
            again.train(resume_from_checkpoint=str(folder / name / "checkpoint-9"))
            result["resumed"] = gathered_state_dict(again.model)
            # The model is sharded by now; its checkpoint is loaded into the shards.
            again.train(resume_from_checkpoint=str(folder / name / "checkpoint-9"))
            result["resumed again"] = gathered_state_dict(again.model)
        if name == "opt":
            options = {"max_steps": 3, "more": {}}
            short = trainer_of(folder / "short", model_of(name), processes, zo_batched_probes=False, **options)
            short.train()
            model = model_of(name)
            model.model.decoder.layers[1].register_forward_pre_hook(refuse_more_rows_than(ROWS // processes))
            tried = trainer_of(folder / "short", model, processes, **options)
            tried.train()
            refusals(folder, processes)
            result["one after another"], result["tried"] = logged(short, "loss"), logged(tried, "loss")
        if name != "adapter":
            plain = model_of(name)
            trainer.model.load_state_dict(plain.state_dict())
            result |= {"folded": folded(trainer.model), "folded whole": folded(plain)}
        torch.save(result, folder / f"{name}-{rank}.pt")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.clone()  # type: ignore[attr-defined]


def first_process_only(name: str) -> nn.Module:
    """A model whose weights the first process alone has in memory, as under fsdp_cpu_ram_efficient_loading."""
    model = model_of(name)
    if os.environ["RANK"] != "0":
        model.to("meta").tie_weights()
    return model


def refusals(folder: Path, processes: int) -> None:
    """What only shows once several processes run."""
    model = model_of("opt")
    more = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-3), None)}
    refused("optimizers", lambda: trainer_of(folder, model, processes, more=more))
    mixed = model_of("opt")
    mixed.model.decoder.final_layer_norm.to(torch.bfloat16)
    refused("dtype", lambda: trainer_of(folder, mixed, processes).train())


def refuse_more_rows_than(rows: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        if len(args[0]) > rows:
            raise NotBatchable("more rows than this layer takes")

    return hook


def folded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights after a fold of coordinates that depend on nothing else."""
    subspace = LowRank(model, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for coordinate in subspace.coordinates.values():
            coordinate.copy_(torch.randn(coordinate.shape, generator=generator) * 1e-3)
    subspace.fold(5, dict.fromkeys(subspace.coordinates, 0.99))
    return gathered_state_dict(model)


def as_on_gpus() -> None:
    """accelerate takes a run on CPUs for one without FSDP, whatever its settings; have it as on GPUs."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    state = Accelerator(cpu=True).state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with the results of so many processes, from one launch for all tests."""

    folders: dict[int, Path] = {}

    def folder_of(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("sharded")
            script = folders[processes] / "run.py"
            script.write_text("from tests.parallel.test_sharded import main\n\nmain()\n")
            run(script, processes, folders[processes], seconds=400, **FSDP)
        return folders[processes]

    return folder_of


@pytest.fixture
def results(case: tuple[int, str], launched: Callable[[int], Path]) -> tuple[Path, int]:
    """The folder with every process's results, and their number."""
    return launched(case[0]), case[0]


def runs(*names: str) -> pytest.MarkDecorator:
    """The test, with the runs of these names that two and three processes make."""
    cases = [(2, name) for name in RUNS_OF_TWO if name in names] + [(3, name) for name in names]
    marked = [pytest.param(case, id=f"{case[0]} {case[1]}", marks=pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked)


def of_all(results: tuple[Path, int], name: str) -> list[dict[str, Any]]:
    folder, processes = results
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)]


@runs(*RUNS)
def test_sharded_processes_equal_one_with_the_same_micro_batches(
    tmp_path: Path, results: tuple[Path, int], case: tuple[int, str]
) -> None:
    name = case[1]
    first = of_all(results, name)[0]
    one = trainer_of(tmp_path, model_of(name), accumulate=results[1], **rows_of(name))
    before = weights_of(one.model)
    assert first["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-3)
    one.train()
    half = "bfloat16" in name
    assert first["loss"] == pytest.approx(logged(one, "loss"), rel=2e-3 if half else 1e-5)
    after = weights_of(one.model)
    assert first["weights"].keys() == after.keys()
    assert any(not torch.equal(after[key], before[key]) for key in after)
    for key, tensor in after.items():
        assert first["weights"][key].dtype == tensor.dtype
        if half:  # a coordinate in its last place decides the rounding of a weight now and then
            assert (first["weights"][key] != tensor).float().mean() < 0.1, key
        torch.testing.assert_close(first["weights"][key], tensor, rtol=0, atol=1e-2 if half else 2e-6)
    assert first["trained eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-3)


@runs(*RUNS)
def test_every_process_has_the_same_coordinates_and_its_own_share_of_the_weights(
    results: tuple[Path, int], case: tuple[int, str]
) -> None:
    name = case[1]
    processes = of_all(results, name)
    first = processes[0]
    for other in processes[1:]:
        assert torch.equal(other["coordinates"], first["coordinates"])
        assert other["loss"] == first["loss"] and other["zo/forward_passes"] == first["zo/forward_passes"]
    assert len(first["coordinates"]) == 20 and first["coordinates"].any()
    for key in first["shapes"]:
        parts = first["weights"][key].chunk(len(processes))  # of four experts over three processes: two, two and none
        rows = [len(part) for part in parts] + [0] * (len(processes) - len(parts))
        assert [process["shapes"][key][0] for process in processes] == rows, key
    assert bool(first["whole"]) == (name == "adapter") and all("lora_" in key for key in first["whole"])


@runs(*WHOLE)
def test_a_fold_gives_shards_the_bits_of_whole_weights(results: tuple[Path, int], case: tuple[int, str]) -> None:
    name = case[1]
    first = of_all(results, name)[0]
    before = weights_of(model_of(name))
    assert all(not torch.equal(first["folded"][key], tensor) for key, tensor in before.items() if tensor.numel() > 99)
    if name == "mixtral":  # products of one or two rows are summed in another order
        torch.testing.assert_close(first["folded"], first["folded whole"], rtol=0, atol=1e-8)
    else:
        assert_same_bits(first["folded"], first["folded whole"])


@runs("opt", "adapter", "rows")
def test_a_sharded_run_resumes_with_the_same_bits(results: tuple[Path, int], case: tuple[int, str]) -> None:
    name = case[1]
    first = of_all(results, name)[0]
    assert_same_bits(first["resumed"], first["weights"])
    assert_same_bits(first["resumed again"], first["weights"])


@runs(*WHOLE)
def test_what_a_sharded_run_saves_loads_whole(results: tuple[Path, int], case: tuple[int, str]) -> None:
    name = case[1]
    first, folder = of_all(results, name)[0], results[0] / name
    loaded = AutoModelForCausalLM.from_pretrained(folder / "final", dtype="auto")
    assert type(loaded) is type(model_of(name))
    assert_same_bits(weights_of(loaded), first["weights"])
    halfway = weights_of(AutoModelForCausalLM.from_pretrained(folder / "checkpoint-9", dtype="auto"))
    assert any(not torch.equal(halfway[key], tensor) for key, tensor in first["weights"].items())
    # What a callback saw at that step, on every process; the file names a tied weight once.
    for rank in range(case[0]):
        seen = torch.load(folder.parent / f"{name}-{rank}.pt")["seen"]
        assert_same_bits({key: seen[key] for key in halfway}, halfway)


@runs("adapter")
def test_a_sharded_run_saves_its_adapter(results: tuple[Path, int]) -> None:
    from peft import PeftModel

    first, folder = of_all(results, "adapter")[0], results[0] / "adapter" / "final"
    loaded = weights_of(PeftModel.from_pretrained(seeded(tiny_opt), folder))
    adapter = {key: tensor for key, tensor in first["weights"].items() if "lora_" in key}
    assert adapter and all(torch.equal(loaded[key], tensor) for key, tensor in adapter.items())


@runs("opt")
def test_a_batch_that_fails_midway_leaves_a_sharded_model_usable(
    results: tuple[Path, int], case: tuple[int, str]
) -> None:
    for process in of_all(results, case[1]):
        assert len(process["tried"]) == 3 and process["tried"] == process["one after another"]


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "FSDP1": ("fsdp_version: 2", {"fsdp_config": {"version": 1}}),
    "full": ("zo_subspace", {"zo_subspace": "full"}),
    "offload": ("fsdp_offload_params", {"fsdp_config": {"cpu_offload": True}}),
    "checkpointed activations": ("activation_checkpointing", {"fsdp_config": {"activation_checkpointing": True}}),
    "XLA": ("fsdp_config", {"fsdp_config": {"xla": True}}),
    "auto_find_batch_size": ("auto_find_batch_size", {"auto_find_batch_size": True}),
    "torch_compile": ("torch_compile", {"torch_compile": True}),
    "save_only_trajectory": ("save_only_trajectory", {"save_only_trajectory": True}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    argument, options = REFUSED[name]
    for variable in FSDP:  # accelerate and transformers set some of them
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    refused(argument, lambda: make_trainer(tmp_path, fsdp=True, **options))


def test_fsdp1_is_refused_when_accelerate_launch_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    refused("fsdp_version: 2", lambda: make_trainer(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_their_trajectory_replays_on_a_whole_model(launched: Callable[[int], Path], processes: int) -> None:
    """It names the model that the processes began with: the first one's."""
    folder = launched(processes)
    replayed = replay(model_of("opt"), folder / "opt")
    result = torch.load(folder / "opt-0.pt")
    for name, tensor in weights_of(replayed).items():
        torch.testing.assert_close(tensor, result["weights"][name], rtol=0, atol=1e-7)
