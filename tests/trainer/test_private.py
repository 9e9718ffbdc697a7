"""Private training in a Trainer: what reaches a step, what leaves it, and what is refused."""

from __future__ import annotations

import math
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_bert, tiny_mixtral, tiny_opt
from tests.trainer.runs import config, logged, make_trainer, trained
from zo_hf import ZOTrainer, forward_only
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.privacy import Guarantee, Secret
from zo_hf.trainer.private import SECRET_FILE, PrivateBatches
from zo_hf.trajectory import read_trajectory, replay

pytest.importorskip("dp_accounting")

OPTIONS: dict[str, Any] = {"zo_dp_noise_multiplier": 8.0, "zo_dp_max_c": 1.0}


def run(folder: Path, **options: Any) -> ZOTrainer:
    return trained(folder, **OPTIONS | options)


def weights(trainer: ZOTrainer) -> dict[str, torch.Tensor]:
    return dict(trainer.model.state_dict())


def test_the_log_has_epsilon_and_delta_and_nothing_without_noise(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=5, zo_dp_noise_multiplier=4.0)
    guarantee = Guarantee(4.0, 64, 8, 0.01)
    assert logged(trainer, "zo/dp_epsilon") == [guarantee.epsilon(step) for step in range(1, 6)]
    assert set(logged(trainer, "zo/dp_delta")) == {0.01}
    allowed = {"grad_norm", "learning_rate", "epoch", "step", "zo/projected_grad", "zo/forward_passes"}
    allowed |= {"zo/skipped_steps", "zo/dp_epsilon", "zo/dp_delta"}
    allowed |= {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert {name for entry in trainer.state.log_history for name in entry} <= allowed
    assert trainer.state.total_flos == 0
    # Two passes of the check and two of each step, whatever the batches hold.
    assert logged(trainer, "zo/forward_passes") == [4, 6, 8, 10, 12]


def test_train_returns_no_loss_of_the_rows(tmp_path: Path) -> None:
    assert math.isnan(make_trainer(tmp_path, **OPTIONS).train().training_loss)


def test_without_noise_and_with_all_rows_the_numbers_are_those_of_plain_training(tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 64, "max_steps": 3, "zo_rows_per_direction": 0, "learning_rate": 1e-3}
    runs = (run(tmp_path / "a", zo_dp_noise_multiplier=0.0, zo_dp_max_c=1e4, **more), trained(tmp_path / "b", **more))
    a, b = (logged(trainer, "zo/projected_grad") for trainer in runs)
    assert a == pytest.approx(b, rel=2e-3, abs=1e-3)
    assert logged(runs[0], "zo/dp_epsilon") == []


@pytest.mark.parametrize(
    "options",
    [
        {"zo_rows_per_direction": 0},
        {"zo_rows_per_direction": 2},
        {"zo_basis": "activation", "zo_fold_steps": 3},
        {"zo_preconditioner": "inputs", "zo_fold_steps": 3},
    ],
    ids=["one direction", "by rows", "activation", "divided"],
)
def test_a_killed_run_resumes_with_the_same_bits_and_the_same_account(tmp_path: Path, options: dict[str, Any]) -> None:
    options = options | {"max_steps": 12, "save_strategy": "steps", "save_steps": 5}
    whole = run(tmp_path, **options)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-5"), **options)
    assert_same_bits(weights(resumed), weights(whole))
    assert logged(resumed, "zo/dp_epsilon") == logged(whole, "zo/dp_epsilon")
    assert logged(resumed, "zo/forward_passes") == logged(whole, "zo/forward_passes")


def test_two_runs_with_the_same_seed_draw_other_noise_and_other_rows(tmp_path: Path) -> None:
    """Otherwise, whoever knows the seed of the log could subtract it."""
    first, second = (run(tmp_path / name, max_steps=2) for name in "ab")
    assert logged(first, "zo/projected_grad") != logged(second, "zo/projected_grad")


def test_the_secret_is_in_checkpoints_alone(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.save_model()
    trainer.create_model_card()
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob(SECRET_FILE))
    assert [str(path) for path in paths] == [f"checkpoint-{step}/{SECRET_FILE}" for step in (2, 4)]
    keys = {(tmp_path / path).read_bytes() for path in paths}
    (key,) = keys
    assert stat.S_IMODE((tmp_path / paths[0]).stat().st_mode) == 0o600
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != SECRET_FILE:
            content = path.read_bytes()
            assert key not in content and key.hex().encode() not in content, path


def test_the_trajectory_replays_to_the_model_without_the_secret(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=7, zo_rows_per_direction=2)
    assert len(read_trajectory(tmp_path).records[0].projected_gradients) == 4
    assert_same_bits(dict(replay(seeded(tiny_opt), tmp_path).state_dict()), weights(trainer))


def test_the_model_card_states_the_guarantee(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=3)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"ε = {Guarantee(8.0, 64, 8, 0.01).epsilon(3):.4g} and δ = 0.01" in card
    assert "arxiv.org/abs/2401.04343" in card and "8/64" in card


def test_training_ends_before_the_step_that_would_exceed_the_target(tmp_path: Path) -> None:
    guarantee = Guarantee(8.0, 64, 8, 1e-4)
    target = (guarantee.epsilon(3) + guarantee.epsilon(4)) / 2
    trainer = run(tmp_path, max_steps=20, zo_dp_target_epsilon=target, zo_dp_delta=1e-4)
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match=r"zo_dp_target_epsilon=1e-06 is below the epsilon of a single step, "):
        run(tmp_path, zo_dp_target_epsilon=1e-6, zo_dp_delta=1e-4)


def test_a_run_that_ended_at_the_target_takes_no_step_when_resumed(tmp_path: Path) -> None:
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "zo_dp_delta": 1e-4}
    targets = [Guarantee(8.0, 64, 8, 1e-4).epsilon(steps) * 1.001 for steps in (3, 5)]
    ended = run(tmp_path, zo_dp_target_epsilon=targets[0], **options)
    folder = str(tmp_path / "checkpoint-3")
    again = run(tmp_path, zo_dp_target_epsilon=targets[0], resume=folder, **options)
    assert again.state.global_step == 3
    assert_same_bits(weights(again), weights(ended))
    assert run(tmp_path, zo_dp_target_epsilon=targets[1], resume=folder, **options).state.global_step == 5


@pytest.mark.parametrize("batched", ["auto", False])
def test_a_budget_of_forward_passes_is_spent_and_not_exceeded(tmp_path: Path, batched: Any) -> None:
    """The check costs two passes of the first step alone."""
    trainer = run(tmp_path, max_steps=-1, zo_max_forward_passes=11, zo_batched_probes=batched)
    assert logged(trainer, "zo/forward_passes") == [4, 6, 8, 10]
    with pytest.raises(ValueError, match="is too small for the first step"):
        run(tmp_path, max_steps=-1, zo_max_forward_passes=3, zo_batched_probes=batched)


def test_accumulation_divides_a_step_into_micro_batches_of_the_same_rows() -> None:
    """And a micro-batch without a row keeps a collator alive with one that does not count."""
    from zo_hf.privacy.poisson import PoissonSampling

    sampling = PoissonSampling(Secret(bytes(32)), 30, 3, 8)
    ranks = [PrivateBatches(sampling, 4, 2, rank) for rank in range(2)]
    loaded = [list(batches) for batches in ranks]
    for step in range(sampling.steps_per_epoch):
        counted, rows = 0, []
        for micro in range(4):
            for batches, fetched in zip(ranks, loaded, strict=True):
                first, count = batches.counted(step, micro)
                assert first == counted
                counted += count
                batch = fetched[4 * step + micro]
                assert len(batch) == max(count, 1)
                rows += batch[:count]
        assert rows == sampling.rows_of(step).tolist()


def test_empty_micro_batches_count_nothing(tmp_path: Path) -> None:
    """One row a step on average: a third of the steps are noise alone."""
    trainer = run(tmp_path, max_steps=12, per_device_train_batch_size=1, zo_dp_noise_multiplier=0.0)
    numbers = logged(trainer, "zo/projected_grad")
    sizes = [trainer._batches.counted(step, 0)[1] for step in range(12)]
    assert 0 in sizes
    assert all(number == 0 for number, size in zip(numbers, sizes, strict=True) if not size)
    assert any(numbers)


@pytest.mark.parametrize("build", [tiny_bert], ids=["classification"])
def test_rows_of_a_classifier_come_apart(tmp_path: Path, build: Any) -> None:
    class Labeled(TinyTask):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            return {"input_ids": row["input_ids"], "labels": torch.tensor(index % 2)}

    trainer = make_trainer(tmp_path, seeded(build), more={"train_dataset": Labeled()}, **OPTIONS)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_loss_function_is_evaluated_row_by_row(tmp_path: Path) -> None:
    """And never gets the count of all rows' labels."""
    counts: list[Any] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        counts.append(num_items_in_batch)
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    trainer = make_trainer(tmp_path, more={"compute_loss_func": loss}, **OPTIONS)
    trainer.train()
    assert set(counts) == {None}


class Own(ZOTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"})["logits"]
        losses = torch.nn.functional.cross_entropy(logits[:, -2], inputs["labels"][:, -1], reduction="none")
        return RowLosses(losses) if self.by_rows else losses.mean()

    by_rows = True


class Whole(Own):
    by_rows = False


def test_an_own_loss_by_rows_trains_and_one_of_all_rows_is_refused(tmp_path: Path) -> None:
    assert run(tmp_path, kind=Own).state.global_step == 4
    with pytest.raises(ValueError, match="needs a loss for every row, and this one is of all rows"):
        run(tmp_path, kind=Whole)


class Logs(Trainer):
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)


def test_what_would_break_the_guarantee_is_refused_before_training(tmp_path: Path) -> None:
    data = TinyTask()
    with pytest.raises(ValueError, match="eval_dataset is train_dataset"):
        make_trainer(tmp_path, more={"train_dataset": data, "eval_dataset": data}, **OPTIONS)
    kind, arguments = forward_only(Logs, type(config(tmp_path)))
    with pytest.raises(ValueError, match=r"Logs\.log may log what it sees of the rows"):
        kind(seeded(tiny_opt), config(tmp_path, arguments, **OPTIONS), train_dataset=data)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(data[i] for i in range(64))

    with pytest.raises(ValueError, match="needs a length; load the data without streaming"):
        make_trainer(tmp_path, more={"train_dataset": Stream()}, **OPTIONS)
    with pytest.raises(ValueError, match=r"a private step of 65 rows needs .* it has 64"):
        run(tmp_path, per_device_train_batch_size=65)


def test_a_search_for_the_learning_rate_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"does not combine with learning_rate='auto': it measures the rows"):
        trainer.find_learning_rate()


def test_a_mixture_of_experts_with_a_loss_of_all_rows_is_refused(tmp_path: Path) -> None:
    model = seeded(tiny_mixtral, output_router_logits=True)
    with pytest.raises(ValueError, match="needs a loss for every row"):
        run(tmp_path, model=model)


def test_a_resumed_run_may_be_longer_and_nothing_else(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run(tmp_path, **options)
    folder = str(tmp_path / "checkpoint-2")
    for changed in ({"learning_rate": 5e-3}, {"per_device_train_batch_size": 4}):
        with pytest.raises(ValueError, match=f"written with {next(iter(changed))}=.* the same noise"):
            run(tmp_path, resume=folder, **options | changed)
    with pytest.raises(ValueError, match="zo_dp_noise_multiplier"):
        run(tmp_path, resume=folder, **options | {"zo_dp_noise_multiplier": 4.0})
    with pytest.raises(ValueError, match="zo_dp_"):
        trained(tmp_path, resume=folder, **options)
    assert run(tmp_path, resume=folder, **options | {"max_steps": 6}).state.global_step == 6
    (tmp_path / "checkpoint-2" / SECRET_FILE).unlink()
    with pytest.raises(ValueError, match="missing"):
        run(tmp_path, resume=folder, **options)


def _process(rank: int, port: int, folder: str, results: Any) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 4, "max_steps": 6, "zo_rows_per_direction": 2}
    trainer = run(Path(folder), **options, save_strategy="steps", save_steps=3)
    results.put((rank, [float(p.double().sum()) for p in trainer.model.parameters()], trainer.state.log_history))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_same_weights_and_one_account(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    processes = [spawn.Process(target=_process, args=(rank, port, str(tmp_path), results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()
    assert found[0][1] == found[1][1]
    epsilons = [entry["zo/dp_epsilon"] for entry in found[0][2] if "zo/dp_epsilon" in entry]
    assert epsilons[-1] == Guarantee(8.0, 64, 8, 0.01).epsilon(6)
    assert len(read_trajectory(tmp_path).records[0].projected_gradients) == 4
    assert (tmp_path / "checkpoint-3" / SECRET_FILE).is_file()
