"""TRL's trainers, made forward-only: they train, file their metrics as TRL does, and learn what their gradient stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from tests.trl.toys import READY, config, folder_of, lines_of, rows, toy_tokenizer
from zo_hf import forward_only

trl = pytest.importorskip("trl")


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer()


TRAINERS: dict[str, tuple[Callable[[], Dataset], dict[str, Any], dict[str, Any]]] = {
    **{name: (*READY[name], {}) for name in ("SFT", "DPO", "KTO", "Reward")},
    "RLOO": (lambda: rows("prompt"), {"num_generations": 2, "max_completion_length": 2}, {"reward_funcs": reward}),
    "GRPO": (lambda: rows("prompt"), {"num_generations": 2, "max_completion_length": 2}, {"reward_funcs": reward}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_trl_trains_and_files_training_metrics(name: str, tmp_path: Path, tokenizer: Any) -> None:
    data, options, more = TRAINERS[name]
    kind, made = forward_only(getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"))
    trainer = kind(
        folder_of(name, tmp_path, tokenizer), args=config(made, tmp_path, **options), train_dataset=data(), **more
    )
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    lines = lines_of(trainer)
    assert len(lines) == 2 and not [key for line in lines for key in line if key.startswith("eval_")]
    assert lines[1]["num_tokens"] > lines[0]["num_tokens"] > 0
    assert any(not torch.equal(tensor, before[key]) for key, tensor in trainer.model.state_dict().items())


def test_an_evaluation_averages_no_probes_in(tmp_path: Path, tokenizer: Any) -> None:
    kind, made = forward_only(trl.SFTTrainer, trl.SFTConfig)
    data = rows("prompt", "completion")
    lines = []
    for steps in (1, 100):
        args = config(made, tmp_path, max_length=16, zo_fold_steps=1, eval_strategy="steps", eval_steps=steps)
        trainer = kind(folder_of("SFT", tmp_path, tokenizer), args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        trainer.evaluate()
        lines.append([line for line in trainer.state.log_history if "eval_loss" in line][-1])
    names = [key for key in lines[0] if not key.endswith(("_runtime", "_per_second"))]
    assert "eval_mean_token_accuracy" in names
    assert [lines[0][key] for key in names] == pytest.approx([lines[1][key] for key in names], abs=1e-6)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_c_of_a_loss_with_detached_weights_is_the_slope_of_its_gradient(
    tmp_path: Path, tokenizer: Any, loss: str
) -> None:
    kind, made = forward_only(trl.SFTTrainer, trl.SFTConfig)
    options = {"max_steps": 1, "max_length": 16, "loss_type": loss, "zo_eps": 1e-4, "learning_rate": 1.0}
    args = config(made, tmp_path, zo_exclude_modules=["embed_tokens", "lm_head"], **options)
    trainer = kind(folder_of("SFT", tmp_path, tokenizer), args=args, train_dataset=rows("prompt", "completion"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    given: dict[str, Any] = {}
    compute_loss = trainer.compute_loss

    def noted(model: Any, inputs: dict, **more: Any) -> Any:
        given.update(inputs=dict(inputs), more=more)
        return compute_loss(model, inputs, **more)

    trainer.compute_loss = noted
    trainer.train()
    c = lines_of(trainer)[0]["zo/projected_grad"]
    named = dict(trainer.model.named_parameters())
    step = {name: (p.detach() - before[name]) / -c for name, p in named.items()}
    for name, p in named.items():
        p.data.copy_(before[name])
    compute_loss(trainer.model, given["inputs"], **given["more"]).backward()
    slope = sum((step[name] * p.grad).sum().item() for name, p in named.items() if p.grad is not None)
    assert abs(c) > 1e-3 and c == pytest.approx(slope, rel=0.05, abs=3e-3)


class KeepsSamples(trl.GRPOTrainer):  # type: ignore[misc,name-defined]
    """Keeps what it has sampled, and the advantages."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.sampled = super()._generate_and_score_completions(inputs)
        return {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self.sampled.items()
        }


def log_probability_gain(model: Any, sampled: dict[str, torch.Tensor]) -> float:
    """The advantage-weighted log-probability of the sampled completions."""
    ids = torch.cat([sampled["prompt_ids"], sampled["completion_ids"]], 1)
    width = sampled["completion_ids"].shape[1]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, -width - 1 : -1]
    logp = logits.double().log_softmax(-1).gather(2, sampled["completion_ids"][..., None])[..., 0]
    return float((logp * sampled["completion_mask"] * sampled["advantages"].double()[:, None]).sum())


def test_grpo_raises_the_probability_of_what_was_rewarded(tmp_path: Path, tokenizer: Any) -> None:
    kind, made = forward_only(KeepsSamples, trl.GRPOConfig)
    path, gains = folder_of("GRPO", tmp_path, tokenizer), []
    for seed in range(4):
        options = {"num_generations": 4, "max_completion_length": 3, "max_steps": 1, "seed": seed, "zo_eps": 1e-4}
        args = config(made, tmp_path, zo_exclude_modules=["embed_tokens", "lm_head"], learning_rate=1e-5, **options)
        trainer = kind(path, reward, args, train_dataset=rows("prompt"))
        start = LlamaForCausalLM.from_pretrained(path)
        trainer.train()
        if trainer.sampled["advantages"].any():
            gains.append(
                log_probability_gain(trainer.model, trainer.sampled) - log_probability_gain(start, trainer.sampled)
            )
    assert len(gains) >= 2 and min(gains) > 0, gains


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [("GRPO", {"loss_type": "vespo"}, "loss_type='vespo'"), ("DPO", {"use_weighting": True}, "use_weighting=True")],
)
def test_weights_that_a_loss_holds_constant_without_detach_are_refused(
    tmp_path: Path, tokenizer: Any, name: str, options: dict[str, Any], option: str
) -> None:
    data, usual, more = TRAINERS[name]
    kind, made = forward_only(getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"))
    with pytest.raises(ValueError, match=rf"^{option} of {name}Trainer does not combine.*; \w+[^.]*\.$"):
        args = config(made, tmp_path, **usual | options)
        kind(folder_of(name, tmp_path, tokenizer), args=args, train_dataset=data(), **more)
