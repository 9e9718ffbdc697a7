"""Everything else a Trainer user knows works: compilation, best models, callbacks, data, search, the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import At, SaveAt, config, logged, make_trainer, trained, with_lora
from zo_hf import ZOSeq2SeqTrainer, ZOTrainer, forward_only

# Compilation, memory, best model.


@pytest.mark.slow
@pytest.mark.parametrize(("subspace", "rows"), [("low_rank", 0), ("low_rank", 1), ("full", 0)])
def test_a_compiled_model_trains_as_an_eager_one(tmp_path: Path, subspace: str, rows: int) -> None:
    """In as many graphs as with one direction, and without a break in any."""
    options = {"max_steps": 5, "learning_rate": 1e-4, "zo_eps": 1e-2, "zo_subspace": subspace}
    options |= {"zo_rows_per_direction": rows}
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = trained(tmp_path, seeded(tiny_opt, num_hidden_layers=1), **options)
    compiled = trained(tmp_path, seeded(tiny_opt, num_hidden_layers=1), torch_compile=True, **options)
    assert logged(compiled, "loss") == pytest.approx(logged(eager, "loss"), rel=1e-4)
    assert logged(compiled, "zo/projected_grad") == pytest.approx(logged(eager, "zo/projected_grad"), rel=1e-2)
    assert not any("forward" in module.__dict__ for module in compiled.model.modules())
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, subspace: str) -> None:
    """A learning rate that breaks the model after a good start, so that the best step is not the last."""

    class Grows(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 if state.global_step < 4 else 3.0

    model = with_lora(seeded(tiny_opt)) if subspace == "adapter" else seeded(tiny_opt)
    options = {"max_steps": 7, "zo_subspace": subspace, "save_strategy": "steps", "save_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "zo_normalize": True}
    options |= {"zo_direction": "gaussian"}
    if subspace == "adapter":
        options["zo_target_modules"] = r".*lora_.*"  # B alone does not break it
    trainer = trained(tmp_path, model, more={"callbacks": [Grows()]}, **options)
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert best <= 5 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    # Between folds the low-rank part is added in another order: equal up to rounding.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())
    if subspace != "adapter":
        saved = type(model).from_pretrained(trainer.state.best_model_checkpoint)
        assert_same_bits(weights_of(model), weights_of(saved))


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_batch_that_does_not_fit_is_made_smaller_and_leaves_no_trace(tmp_path: Path, subspace: str) -> None:
    class Small(ZOTrainer):
        limit = 7

        def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return loss

    class Large(Small):
        limit = 1000

    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    trainer = trained(tmp_path, model, Small, zo_subspace=subspace, auto_find_batch_size=True)
    assert trainer._train_batch_size <= 7 and trainer.state.global_step == 4
    size = trainer._train_batch_size
    trained(tmp_path, reference, Large, zo_subspace=subspace, per_device_train_batch_size=size)
    assert_same_bits(weights_of(model), weights_of(reference))


# Callbacks, evaluation, search, subclasses.


class Reporter(TrainerCallback):
    """Stands for Weights & Biases, TensorBoard and the like: what it is sent in `on_log`, and the order of calls."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.calls: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("begin")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("substep")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("pre")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("end")


def test_reporting_callbacks_get_the_zeroth_order_metrics(tmp_path: Path) -> None:
    reporter = Reporter()
    trained(tmp_path, more={"callbacks": [reporter]}, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    keys = {"loss", "grad_norm", "learning_rate", "zo/projected_grad", "zo/forward_passes", "zo/skipped_steps"}
    steps = [logs for logs in reporter.logs if "loss" in logs]
    assert len(steps) == 2 and all(keys <= set(logs) for logs in steps)
    assert all(isinstance(logs[key], float | int) for logs in steps for key in keys)
    assert reporter.calls == ["begin", "substep", "pre", "step", "end"] * 4


def test_a_callback_can_stop_the_training(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = trained(tmp_path, more={"callbacks": [Stops()]}, max_steps=9)
    assert trainer.state.global_step == 3 and trainer.zo is None


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_evaluating_and_predicting_on_the_way_sees_the_model_of_that_step_and_changes_nothing(
    tmp_path: Path, subspace: str
) -> None:
    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    look = At({2, 4}, lambda state, **kwargs: (trainer.predict(TinyTask(16)), trainer.evaluate()["eval_loss"]))
    options = {"zo_subspace": subspace, "learning_rate": 1e-3, "max_steps": 5}
    trainer = make_trainer(tmp_path, model, more={"callbacks": [look, SaveAt(2, 4)]}, **options)
    trainer.train()
    for step, (prediction, loss) in zip((2, 4), look.results, strict=True):
        again = make_trainer(tmp_path, type(model).from_pretrained(tmp_path / f"checkpoint-{step}"))
        expected = again.predict(TinyTask(16))
        torch.testing.assert_close(
            torch.from_numpy(prediction.predictions), torch.from_numpy(expected.predictions), rtol=1e-4, atol=1e-5
        )
        assert loss == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    trained(tmp_path, reference, **options)
    assert_same_bits(weights_of(model), weights_of(reference))


def test_model_init_starts_every_training_anew(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, more={"model_init": lambda: seeded(tiny_opt)})
    trainer.train()
    first = weights_of(trainer.model)
    trainer.train()
    assert_same_bits(weights_of(trainer.model), first)
    assert_same_bits(weights_of(trained(tmp_path, seeded(tiny_opt)).model), first)


class ScriptedSearch:
    """A search backend that tries what it is given, in the manner of transformers' one for Optuna."""

    learning_rates = (1e-7, 1e-3)

    def ensure_available(self) -> None:
        pass

    def default_hp_space(self, trial: Any) -> dict[str, Any]:
        return trial.params

    def run(self, trainer: ZOTrainer, n_trials: int, direction: str, **kwargs: Any) -> Any:
        objectives = {}
        for number, rate in enumerate(self.learning_rates[:n_trials]):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate, "zo_rank": 2}))
            objectives[rate] = trainer.evaluate()["eval_loss"]
            trainer.model_wrapped = trainer.model = None
            trainer.accelerator.clear()
        return min(objectives, key=objectives.get), objectives


def test_hyperparameter_search_trains_with_every_trials_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import trainer as module

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, ScriptedSearch)
    look = At({1}, lambda state, **kwargs: (trainer.args.learning_rate, trainer.zo.subspace.rank))
    options = {"max_steps": 30, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 30}
    more = {"model_init": lambda: seeded(tiny_opt), "callbacks": [look]}
    trainer = make_trainer(tmp_path, more=more, **options)
    best, objectives = trainer.hyperparameter_search(n_trials=2, backend="optuna")
    assert best == 1e-3 and objectives[1e-3] < objectives[1e-7] - 0.3
    assert look.results == [(1e-7, 2), (1e-3, 2)]
    for number in (0, 1):
        assert (tmp_path / f"run-{number}" / "checkpoint-30" / "zo_state.json").exists()


def test_hyperparameter_search_with_optuna(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, more={"model_init": lambda: seeded(tiny_opt)}, **options)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)},
        n_trials=2,
        backend="optuna",
    )
    assert 1e-5 <= best.hyperparameters["learning_rate"] <= 1e-3 and best.objective > 0


def test_the_mixin_makes_another_trainer_forward_only(tmp_path: Path) -> None:
    class Mine(Trainer):
        """Has its own data loader and logs something more."""

        def get_train_dataloader(self) -> Any:
            self.asked_for_data = True
            return super().get_train_dataloader()

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs | {"mine": 1.0}, *args, **kwargs)

    ZOMine, _ = forward_only(Mine, TrainingArguments)
    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    trainer = ZOMine(model, config(tmp_path), train_dataset=TinyTask())
    trainer.train()
    trained(tmp_path, reference)
    assert_same_bits(weights_of(model), weights_of(reference))
    assert trainer.asked_for_data and logged(trainer, "mine") and len(logged(trainer, "zo/forward_passes")) == 4


@pytest.mark.parametrize("kind", [ZOTrainer, ZOSeq2SeqTrainer])
def test_data_evaluation_and_the_loop_are_the_stock_ones(kind: type[ZOTrainer]) -> None:
    stock = Seq2SeqTrainer if kind is ZOSeq2SeqTrainer else Trainer
    names = ["evaluate", "predict", "prediction_step", "compute_loss", "push_to_hub"]
    names += ["save_model", "hyperparameter_search", "_inner_training_loop", "_run_epoch"]
    for name in names:
        assert getattr(kind, name) is getattr(stock, name), name


def test_a_prediction_step_of_one_trainer_is_called_in_every_evaluation_and_stays(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, seeded(tiny_opt), max_steps=2, eval_strategy="steps", eval_steps=1)
    stock, called = trainer.prediction_step, []

    def own(*args: Any, **kwargs: Any) -> Any:
        called.append(trainer.state.global_step)
        return stock(*args, **kwargs)

    trainer.prediction_step = own  # type: ignore[method-assign]
    trainer.train()
    assert set(called) == {1, 2} and trainer.prediction_step is own


@pytest.mark.parametrize("name", ["get_eval_dataloader", "get_test_dataloader"])
def test_without_a_pipeline_data_for_evaluation_is_what_trainer_hands_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, asked = object(), []
    monkeypatch.setattr(Trainer, name, lambda self, *args, **kwargs: asked.append((args, kwargs)) or loader)
    trainer = ZOTrainer(seeded(tiny_opt), config(tmp_path), train_dataset=TinyTask())
    rows = TinyTask(3)
    assert getattr(trainer, name)(rows) is loader and asked == [((rows,), {})]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (TinyTask()[index] for index in range(20))


def test_an_iterable_dataset_is_read_again_until_max_steps(tmp_path: Path) -> None:
    trainer = trained(tmp_path, more={"train_dataset": Stream()}, max_steps=7)
    assert trainer.state.global_step == 7 and len(logged(trainer, "loss")) == 7


# The Hub.


def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Nothing leaves the machine; returns what is uploaded: repository, message, folder in it, names of files."""
    from huggingface_hub import HfApi

    uploads: list[tuple] = []

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self: HfApi, *, folder_path: str, run_as_future: bool = False, **kwargs: Any) -> Any:
        names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")}
        uploads.append((kwargs["repo_id"], kwargs["commit_message"], kwargs.get("path_in_repo"), names))
        future: Future = Future()
        future.set_result(SimpleNamespace(repo_url="https://example.org"))
        return future if run_as_future else future.result()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploads


def test_checkpoints_are_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = fake_hub(monkeypatch)
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path / "tiny", **options)
    trainer.push_to_hub(commit_message="End of training")
    messages = [message for _, message, _, _ in uploads]
    assert {repo for repo, _, _, _ in uploads} == {"someone/tiny"}
    assert "Training in progress, step 2" in messages and messages[-1] == "End of training"
    folders = {path: names for _, _, path, names in uploads if path}
    assert set(folders) == {"checkpoint-2", "checkpoint-4"}
    assert all({"model.safetensors", "trainer_state.json", "zo_state.json"} <= names for names in folders.values())
    assert {"README.md", "model.safetensors"} <= uploads[-1][3]


def test_the_model_card_is_written(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(language="en", license="apache-2.0", model_name="tiny", tags=["zeroth-order"])
    card = (tmp_path / "README.md").read_text()
    assert "zeroth-order" in card and "# tiny" in card and "learning_rate: 0.01" in card
