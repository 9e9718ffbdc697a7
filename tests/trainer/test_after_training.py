"""Outside of `train()`: rates, the optimizer, the model card, the saved arguments, and methods called on their own."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import config, logged, make_trainer, trained, with_lora
from zo_hf import forward_only


@pytest.mark.parametrize(
    "options", [{}, {"zo_subspace": "full"}, {"zo_subspace": "norms"}, {"optim": "adamw_torch"}], ids=str
)
def test_the_optimizer_keeps_its_rates_and_refers_to_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = trained(tmp_path, lr_scheduler_type="linear", **options)
    assert trainer.get_learning_rates() == [0.0] * len(trainer.optimizer.param_groups)
    weights = {id(p) for p in trainer.model.parameters()}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert held and {id(p) for p in held} <= weights and not trainer.optimizer.state
    assert "lr" in trainer.get_optimizer_group(held[0])
    middle = weights_of(trainer.model)
    trainer.train()  # with an optimizer of its own
    assert any(not torch.equal(tensor, middle[name]) for name, tensor in weights_of(trainer.model).items())


def test_before_any_training_there_are_no_rates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer is None"):
        make_trainer(tmp_path).get_learning_rates()


def test_a_step_outside_of_training_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"training_step belongs to a step of train\(\).*compute_loss"):
            trainer.training_step(trainer.model, batch)
        trainer.train()


def test_operations_are_counted_outside_of_training_as_inside(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, zo_num_directions=2)
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    forward = Trainer.floating_point_ops(trainer, inputs) // 3
    before = trainer.floating_point_ops(inputs)
    trainer.create_optimizer()
    assert before == trainer.floating_point_ops(inputs) == 4 * forward > 0


# The saved arguments.


@pytest.mark.parametrize("options", [{"learning_rate": None}, {"learning_rate": 3e-3}], ids=str)
def test_the_saved_arguments_have_the_rate_that_was_used(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = trained(tmp_path, save_strategy="steps", save_steps=2, **options)
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "saved"):
        saved = torch.load(folder / "training_args.bin", weights_only=False)
        assert saved.learning_rate == (options["learning_rate"] or 1e-5)
    assert trainer.args.learning_rate == options["learning_rate"]


def test_a_found_rate_is_saved(tmp_path: Path) -> None:
    trainer = trained(tmp_path, learning_rate="auto", max_steps=40)
    trainer.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert saved.learning_rate == trainer.found_learning_rate.learning_rate


@dataclass
class TheirConfig(TrainingArguments):
    """Arguments of a subclass."""

    packing: bool = False


def test_the_arguments_of_a_made_config_are_saved_and_read(tmp_path: Path) -> None:
    kind, made = forward_only(Trainer, TheirConfig)
    args = config(tmp_path, made, packing=True, save_strategy="steps", save_steps=4)
    kind(seeded(tiny_opt), args, train_dataset=TinyTask()).train()
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert type(saved) is made is forward_only(Trainer, TheirConfig)[1] and saved.packing
    assert pickle.loads(pickle.dumps(args)).zo_fold_steps == args.zo_fold_steps


# The model card.


ONE_DIRECTION = {"zo_rows_per_direction": 0, "zo_batched_probes": False}


def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    trainer = trained(tmp_path, seed=7, learning_rate=None, zo_estimator="one_sided", **ONE_DIRECTION)
    for _ in range(2):  # a second card replaces the first one's section
        trainer.create_model_card(model_name="tiny", tags=["mine"])
        card = (tmp_path / "README.md").read_text()
    for words in ("- mine\n", "- zo_hf\n", "- zeroth-order-optimization", "| forward passes | 8 |", "| seed | 7 |"):
        assert card.count(words) == 1, words
    for words in (
        "| learning rate | 1e-05 |",
        "| steps | 4 |",
        "| zo_estimator | one_sided |",
        "zo_subspace | low_rank",
    ):
        assert words in card, words
    assert "LOZO ([2410.07698](https://arxiv.org/abs/2410.07698))" in card and "learning_rate: 1e-05" in card


def test_a_subclass_that_writes_its_own_card_gets_the_section(tmp_path: Path) -> None:
    class Writes(Trainer):
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            (Path(self.args.output_dir) / "README.md").write_text(
                f"---\ntags: theirs\n---\n# Rate {self.args.learning_rate}\n"
            )

    kind, made = forward_only(Writes, TrainingArguments)
    trainer = kind(seeded(tiny_opt), config(tmp_path, made, learning_rate=None), train_dataset=TinyTask())
    trainer.create_model_card()
    assert "Zeroth-order" not in (tmp_path / "README.md").read_text()  # nothing was trained
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "# Rate 1e-05" in card and "## Zeroth-order training" in card and "- theirs" in card and "- zo_hf" in card


# Models in wrappers.


def test_a_compiled_peft_model_is_a_peft_model(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    plain = trained(tmp_path / "plain", with_lora(seeded(tiny_opt)), **options)
    inner = with_lora(seeded(tiny_opt))
    calls: list[int] = []
    compiled = torch.compile(inner, backend="eager")
    compiled.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.compiler.set_stance("force_eager"):  # the wrapper is what matters here, and compiling takes long
        trainer = trained(tmp_path / "compiled", compiled, load_best_model_at_end=True, **options)
        again = trained(
            tmp_path, torch.compile(with_lora(seeded(tiny_opt))), resume=tmp_path / "compiled/checkpoint-2"
        )
    assert len(calls) >= logged(trainer, "zo/forward_passes")[-1]
    assert_same_bits(weights_of(again.model), weights_of(plain.model))
    base = weights_of(seeded(tiny_opt))["model.decoder.layers.0.fc1.weight"]
    assert torch.equal(inner.get_base_model().model.decoder.layers[0].fc1.base_layer.weight, base)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").is_file() and trainer.model is inner


def test_the_best_of_an_adapter_with_another_name_is_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(seeded(tiny_opt), lora, adapter_name="mine")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path, model, load_best_model_at_end=True, learning_rate=1e-2, **options)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
