"""Pipelines of two and three processes: the run of one process, bit for bit, on processes that each hold some layers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import LENGTH, TinyTask, assert_same_bits, seeded, tiny_gpt2, tiny_llama, tiny_opt
from tests.parallel.launch import finish, log_of, run, start
from tests.trainer.runs import At, SaveAt, logged, make_trainer, with_lora
from zo_hf import ZOTrainer
from zo_hf.parallel.absent import is_absent
from zo_hf.parallel.channel import Channel
from zo_hf.parallel.shards import gathered_state_dict
from zo_hf.trajectory import replay

pytestmark = pytest.mark.slow

LAYERS, ROWS, WIDTH = 3, 8, 32
OPTIONS = {"max_steps": 8, "learning_rate": 1e-3, "zo_eps": 1e-2, "zo_fold_steps": 3, "save_strategy": "no"}
ONE: dict[str, Any] = {"zo_rows_per_direction": 0}
HALVES = {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}

# The tiny OPT and GPT-2 tie their head to the embedding, Llama does not.
RUNS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "llama by rows": (tiny_llama, {}),
    "llama in one batch": (tiny_llama, ONE | {"zo_batched_probes": True} | HALVES),
    "opt with lora": (tiny_opt, {"zo_batched_probes": True}),
    "gpt2 by rows": (tiny_gpt2, {"optim": "adamw_torch"} | HALVES),
    "opt in bfloat16": (tiny_opt, ONE | {"bf16": True, "zo_num_directions": 2, "zo_batched_probes": False}),
}
RESUMED = ("llama by rows", "opt with lora", "gpt2 by rows")


def model_of(name: str, seed: int = 0) -> nn.Module:
    build = RUNS[name][0]
    model = seeded(build, seed=seed, **{"n_layer" if build is tiny_gpt2 else "num_hidden_layers": LAYERS})
    return with_lora(model) if "lora" in name else model


def trainer_of(
    folder: Path, name: str, model: nn.Module, more: dict[str, Any] | None = None, **options: Any
) -> ZOTrainer:
    return make_trainer(folder, model, more=more, **OPTIONS | RUNS[name][1] | options)


def main() -> None:
    """The work of each of the launched processes."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    shared: list[int] = []
    share = Channel.share

    def counted(channel: Channel, outputs: Any) -> Any:
        shared.append(1)
        return share(channel, outputs)

    Channel.share = counted  # type: ignore[method-assign]
    for name in RUNS:
        seen = At({5}, lambda state, model, **_: dict(model.state_dict()))
        passes = At(None, lambda state, **_: len(shared))
        options: dict[str, Any] = {"zo_parallel": "pipeline", "eval_strategy": "steps", "eval_steps": 4}
        seed = rank if "lora" not in name else 0  # a head of one's own is the first process's, and so is a whole model
        trainer = trainer_of(
            folder / name, name, model_of(name, seed), {"callbacks": [SaveAt(4), seen, passes]}, **options
        )
        result: dict[str, Any] = {"eval_loss": trainer.evaluate()["eval_loss"]}
        trainer.train()
        result["weights"] = gathered_state_dict(trainer.model)
        named = dict(trainer.model.named_parameters())
        result["held"] = {key: p.untyped_storage().nbytes() for key, p in named.items() if not is_absent(p)}
        result["freed"] = sum(p.untyped_storage().nbytes() for p in named.values() if is_absent(p))
        result["absent"] = [key for key, p in named.items() if is_absent(p)]
        result["meta"] = [key for key, tensor in seen.results[0].items() if tensor.is_meta]
        result |= {key: logged(trainer, key) for key in ("loss", "zo/forward_passes", "zo/bytes_communicated")}
        result["trained eval_loss"] = trainer.evaluate()["eval_loss"]
        result["predictions"] = torch.tensor(trainer.predict(TinyTask(11)).predictions)
        result["shared"] = passes.results
        trainer.save_model(str(folder / name / "final"))
        if name in RESUMED:  # killed after step 4, between two folds
            again = trainer_of(folder / name, name, model_of(name, 0 if "lora" in name else rank + 5), **options)
            again.train(resume_from_checkpoint=str(folder / name / "checkpoint-4"))
            result["resumed"] = gathered_state_dict(again.model)
            # The model is divided by now; its checkpoint is loaded into the stages.
            again.train(resume_from_checkpoint=str(folder / name / "checkpoint-4"))
            result["resumed again"] = gathered_state_dict(again.model)
        torch.save(result, folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with the results of so many processes, from one launch for all tests."""
    folders: dict[int, Path] = {}

    def folder_of(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("pipeline")
            script = folders[processes] / "run.py"
            script.write_text("from tests.parallel.test_pipeline import main\n\nmain()\n")
            run(script, processes, folders[processes], seconds=900)
        return folders[processes]

    return folder_of


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("processes", [2, 3])
def test_a_pipeline_has_the_bits_of_one_process(
    tmp_path: Path, launched: Callable[[int], Path], processes: int, name: str
) -> None:
    folder = launched(processes)
    results = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)]
    first = results[0]
    # A single CPU takes both signs of rows in one pass, and makes two more passes to find that out.
    alone = {"zo_batched_probes": False} if "by rows" in name else {}
    one = trainer_of(tmp_path, name, model_of(name), **alone)
    assert first["eval_loss"] == one.evaluate()["eval_loss"]
    one.train()
    assert first["loss"] == logged(one, "loss")
    assert set(first["zo/forward_passes"]) >= set(logged(one, "zo/forward_passes"))
    weights = dict(one.model.state_dict())
    assert_same_bits(first["weights"], weights)
    assert any(not torch.equal(weights[key], tensor) for key, tensor in model_of(name).state_dict().items())
    one.save_model(str(tmp_path / "final"))
    saved = [next((path / "final").glob("*.safetensors")) for path in (folder / name, tmp_path)]
    assert_same_bits(*map(load_file, saved))
    evaluated, predicted = one.evaluate()["eval_loss"], torch.tensor(one.predict(TinyTask(11)).predictions)
    for result in results:
        assert result["trained eval_loss"] == evaluated
        assert torch.equal(result["predictions"], predicted)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_holds_its_layers_alone(launched: Callable[[int], Path], processes: int, name: str) -> None:
    results = [torch.load(launched(processes) / f"{name}-{rank}.pt") for rank in range(processes)]
    named = dict(model_of(name).named_parameters())
    for result in results:
        assert result["held"].keys() | set(result["absent"]) == named.keys()
        assert result["freed"] == sum(named[key].element_size() for key in result["absent"])
        assert set(result["absent"]) <= set(result["meta"])
    layers = [key for key in named if (".layers." in key or ".h." in key) and "lora" not in key]
    holders = {key: [key in result["held"] for result in results] for key in layers}
    assert all(sum(by) == 1 for by in holders.values()) and len(layers) > 10
    if "lora" in name:
        assert all(key in result["held"] for key in named if "lora" in key for result in results)


@pytest.mark.parametrize("name", RUNS)
def test_after_the_first_step_nothing_comes_back_but_losses(launched: Callable[[int], Path], name: str) -> None:
    results = [torch.load(launched(2) / f"{name}-{rank}.pt") for rank in range(2)]
    first, last = results[0]["shared"], results[0]["shared"][-1]
    evaluated = 2  # batches of the evaluation after step 4
    assert first[1:4] == [first[0]] * 3 and first[4:] == [last] * 4
    assert last - first[0] == evaluated
    # The bytes of a step without an evaluation: activations of all passes to the second stage, losses, count, loss to log.
    sent = [result["zo/bytes_communicated"] for result in results]
    settings = RUNS[name][1]
    directions, groups = settings.get("zo_num_directions", 1), 1 if "zo_rows_per_direction" in settings else ROWS
    activations = 2 * directions * ROWS * LENGTH * WIDTH * 4
    back = 16 * directions * groups + 8 + 8
    assert sent[0][2] - sent[0][1] == activations + back
    assert sent[1][2] - sent[1][1] == back


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("processes", [2, 3])
def test_a_resumed_pipeline_goes_on_with_the_same_bits(
    launched: Callable[[int], Path], processes: int, name: str
) -> None:
    first = torch.load(launched(processes) / f"{name}-0.pt")
    assert_same_bits(first["resumed"], first["weights"])
    assert_same_bits(first["resumed again"], first["weights"])


def test_one_process_replays_the_log_of_a_pipeline(launched: Callable[[int], Path]) -> None:
    folder = launched(2)
    model = model_of("llama by rows")
    replay(model, folder / "llama by rows" / "trajectory")
    assert_same_bits(dict(model.state_dict()), torch.load(folder / "llama by rows-0.pt")["weights"])


GRID = """
import sys
from pathlib import Path
import torch
from tests.parallel.test_pipeline import ONE, model_of, trainer_of
from zo_hf.parallel.shards import gathered_state_dict
from tests.trainer.runs import logged

folder, parallel = Path(sys.argv[1]), sys.argv[2]
name = "llama by rows"
options = {"zo_parallel": parallel, "zo_pipeline_stages": 2, "per_device_train_batch_size": 4}
if parallel == "directions":
    options |= {"zo_rows_per_direction": 0, "zo_num_directions": 2, "per_device_train_batch_size": 8}
trainer = trainer_of(folder, name, model_of(name), **options)
evaluated = trainer.evaluate()["eval_loss"]
trainer.train()
weights = gathered_state_dict(trainer.model)
if trainer.is_world_process_zero():
    result = {"weights": weights, "loss": logged(trainer, "loss"), "eval_loss": evaluated}
    torch.save(result, folder / "result.pt")
"""


@pytest.mark.parametrize("parallel", ["pipeline", "directions"])
def test_two_pipelines_divide_rows_or_directions(tmp_path: Path, parallel: str) -> None:
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "run.py").write_text(GRID)
    run(folder / "run.py", 4, folder, parallel, seconds=900)
    result = torch.load(folder / "result.pt")
    name = "llama by rows"
    options = ONE | {"zo_num_directions": 2} if parallel == "directions" else HALVES
    one = trainer_of(tmp_path, name, model_of(name), **options)
    assert result["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-6)
    before = dict(model_of(name).state_dict())
    one.train()
    assert result["loss"] == pytest.approx(logged(one, "loss"), rel=1e-5)
    after = one.model.state_dict()
    moved = max((after[key] - before[key]).abs().max().item() for key in after)
    apart = max((after[key] - result["weights"][key]).abs().max().item() for key in after)
    assert apart < 1e-3 * moved


DYING = """
import sys
from tests.parallel.test_pipeline import model_of, trainer_of

trainer = trainer_of(sys.argv[1], "llama by rows", model_of("llama by rows"), zo_parallel="pipeline",
                     max_steps=100_000, ddp_timeout=30, disable_tqdm=True)
trainer.train()
"""


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_a_stage_dies_the_others_say_so_and_stop(tmp_path: Path, victim: int) -> None:
    script = tmp_path / "run.py"
    script.write_text(DYING)
    processes = start(script, 3, tmp_path)
    deadline = time.monotonic() + 200
    while processes[0].said().count("projected_grad") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[victim].kill()
    killed = time.monotonic()
    codes = finish(processes, 120)
    said = {rank: log_of(script, rank).read_text() for rank in range(3)}
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)], said
    assert time.monotonic() - killed < 100
    for rank in {0, 1, 2} - {victim}:
        last = said[rank].strip().splitlines()[-1]
        assert "of this run has stopped or does not answer" in last and last.count(". ") <= 1, last
    assert any(f"the process of rank {victim} of this run" in text for rank, text in said.items() if rank != victim)
