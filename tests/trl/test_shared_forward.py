"""TRL's losses at the probes of a step: one forward pass for all of them gives the losses of one each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from tests.conftest import seeded, weights_of
from tests.trl.test_by_rows import FREE
from tests.trl.test_pairs import trainer_of
from tests.trl.toys import READY, WORDS, config, folder_of, lines_of
from zo_hf import forward_only

trl = pytest.importorskip("trl")

CASES = [
    ("SFT", {"loss_type": "dft"}),
    ("SFT", {"label_smoothing_factor": 0.1}),
    ("DPO", {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ("DPO", {"loss_type": "aot"}),  # a loss of all rows together
    ("Reward", {"center_rewards_coefficient": 0.1}),
]


class Passes(TrainerCallback):
    """Counts the forward passes of the trained model in the last step, and notes whether its probes share them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.count = 0
        self.handle = self.trainer.model.register_forward_hook(self.see)

    def see(self, *_: Any) -> None:
        self.count += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.handle.remove()
        self.batched = self.trainer.zo.evaluator.batched


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_one_pass_gives_the_steps_of_two(name: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    options = {"max_steps": 3, "learning_rate": 1e-3, "zo_rows_per_direction": 0, "zo_eps": 1e-2} | options
    trainers, watches = [], []
    for batched in (False, "auto"):
        trainers.append(trainer_of(name, tmp_path, tokenizer, zo_batched_probes=batched, **options))
        watches.append(Passes(trainers[-1]))
        trainers[-1].train()
    assert [watch.batched for watch in watches] == [False, True]
    one_by_one, shared = map(lines_of, trainers)
    apart = {line["zo/projected_grad"] for line in one_by_one}
    assert len(apart) == 3 and min(map(abs, apart)) > 1e-4
    for line, other in zip(one_by_one, shared, strict=True):
        assert set(line) == set(other) and line["num_tokens"] == other["num_tokens"]
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["zo/projected_grad"] == pytest.approx(line["zo/projected_grad"], rel=1e-2, abs=1e-4)
    for key, tensor in weights_of(trainers[0].model).items():
        torch.testing.assert_close(tensor, weights_of(trainers[1].model)[key], rtol=1e-3, atol=1e-4)
    saved = 2 if "label_smoothing_factor" in options else 1  # it calls the model once more for the metrics
    assert watches[0].count - watches[1].count == saved


def test_packed_sequences_take_a_pass_each(tmp_path: Path, tokenizer: Any) -> None:
    trainer = trainer_of("SFT", tmp_path, tokenizer, zo_rows_per_direction=0, **FREE)
    watch = Passes(trainer)
    trainer.train()
    assert watch.batched is False and watch.count == 2


class Shuffles(trl.SFTTrainer):  # type: ignore[misc,name-defined]
    """Calls the model with other inputs at every probe."""

    calls = 0  # of the class: a later call undoes what it writes to attributes of the trainer

    def compute_loss(self, model: Any, inputs: dict, **kwargs: Any) -> Any:
        inputs["input_ids"] = inputs["input_ids"].roll(Shuffles.calls, 1)
        Shuffles.calls += 1
        return super().compute_loss(model, inputs, **kwargs)


def test_a_loss_with_other_inputs_at_every_probe_takes_a_pass_each(tmp_path: Path, tokenizer: Any) -> None:
    made, arguments = forward_only(Shuffles, trl.SFTConfig)
    data, usual = READY["SFT"]
    args = config(arguments, tmp_path, **usual, zo_rows_per_direction=0, zo_batched_probes=True)
    trainer = made(folder_of("SFT", tmp_path, tokenizer), args=args, train_dataset=data())
    with pytest.raises(RuntimeError, match=r"^zo_batched_probes=True cannot .*: the loss calls the model differently"):
        trainer.train()


@pytest.mark.parametrize("batched", [True, "auto"])
def test_the_loss_of_a_router_takes_a_pass_each(batched: bool | str, tmp_path: Path, tokenizer: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = MixtralConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, num_local_experts=2, output_router_logits=True, **sizes
    )
    seeded(lambda: MixtralForCausalLM(made)).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    options = {"zo_rows_per_direction": 0, "zo_batched_probes": batched, "learning_rate": 1e-4}
    trainer = trainer_of("SFT", tmp_path, tokenizer, str(tmp_path / "moe"), **options)
    if batched is True:
        with pytest.raises(RuntimeError, match="the loss of the router is one of all rows together; use zo_batched_"):
            trainer.train()
    else:
        trainer.train()
        assert len(lines_of(trainer)) == 2
