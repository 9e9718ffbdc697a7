"""TRL's own losses by rows: the same loss, apart, and an estimate of the same gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import weights_of
from tests.trl.test_pairs import trainer_of
from tests.trl.toys import lines_of
from zo_hf.evaluation.packed_loss import PackedLoss
from zo_hf.evaluation.row_losses import LossByRows
from zo_hf.trainer.micro_batch import MicroBatch

ROWS = 4

PACKED = {"packing": True, "max_length": 24, "per_device_train_batch_size": 1}
FREE = {"padding_free": True, "max_length": None}

APART = [
    ("SFT", {}),
    ("SFT", {"loss_type": "dft"}),
    ("SFT", {"label_smoothing_factor": 0.1}),
    ("SFT", {"completion_only_loss": False}),
    ("SFT", FREE),
    ("SFT", FREE | {"completion_only_loss": False}),
    ("SFT", FREE | {"loss_type": "dft"}),
    ("SFT", PACKED),
    *(
        ("DPO", {"loss_type": kind, "label_smoothing": 0.1})
        for kind in ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard")
    ),
    *(("DPO", {"loss_type": kind}) for kind in ("apo_zero", "apo_down", "discopop", "sigmoid_norm")),
    ("DPO", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]}),
    ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ("DPO", {"ld_alpha": 0.5}),
    ("DPO", {"f_divergence_type": "js_divergence"}),
    ("DPO", {"precompute_ref_log_probs": True}),
    ("Reward", {}),
    ("Reward", {"center_rewards_coefficient": 0.1}),
]

WHOLE = [
    ("DPO", {"loss_type": "aot"}),
    ("DPO", {"loss_type": "aot_unpaired"}),
    *((name, {}) for name in ("KTO", "CPO", "ORPO", "TPO")),
]


class Watch(TrainerCallback):
    """Calls an action when a training begins, and keeps what the engine has found out about rows.

    Args:
        trainer: the trainer, which it joins.
        action: called without arguments, when the engine exists.
        in_step: called without arguments, after the probes of a step.
    """

    def __init__(self, trainer: Any, action: Any = None, in_step: Any = None) -> None:
        self.trainer, self.action, self.in_step = trainer, action, in_step
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.result = self.action and self.action()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.found = self.in_step and self.in_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.comes_apart, self.groups = (
            self.trainer.zo.row_groups.comes_apart,
            self.trainer.zo.row_groups.groups_per_batch,
        )


def first_batch(trainer: Any) -> tuple[dict[str, Any], Any]:
    """The inputs of the first step, and its number of labels."""
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    return trainer._prepare_inputs(batches[0]), items


def row_of(inputs: dict[str, Any], row: int, pairs: bool) -> dict[str, Any]:
    """The batch of one row or pair alone."""
    rows = len(inputs["input_ids"])

    def chosen(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if len(value) == rows:
            return value[[row, row + rows // 2]] if pairs else value[row : row + 1]
        return value[row : row + 1] if pairs else value

    return {name: chosen(value) for name, value in inputs.items()}


@torch.no_grad()
def trl_loss(trainer: Any, inputs: dict[str, Any], items: Any) -> float:
    trainer.model.eval()
    return float(trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items))


@pytest.mark.parametrize(("name", "options"), APART, ids=str)
def test_the_shares_add_up_to_the_loss_of_trl(
    name: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    trainer = trainer_of(name, tmp_path, tokenizer, **{"max_steps": 2, "learning_rate": 1e-4} | options)

    @torch.no_grad()
    def compare() -> Any:
        inputs, items = first_batch(trainer)
        closure = lambda: trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items)  # noqa: E731
        loss = trainer.loss_by_rows(closure, inputs)
        shares = loss.by_groups(loss.rows)
        assert shares.sum().item() == pytest.approx(trl_loss(trainer, inputs, items), rel=1e-5)
        assert isinstance(loss, PackedLoss if "padding_free" in options or "packing" in options else LossByRows)
        if isinstance(loss, LossByRows) and "sft" not in options.get(
            "loss_type", ""
        ):  # a mean over tokens of all pairs
            pairs = name != "SFT"
            alone = [trl_loss(trainer, row_of(inputs, row, pairs), items) for row in range(loss.rows)]
            assert shares.tolist() == pytest.approx([a / ROWS if pairs else a for a in alone], rel=1e-5, abs=1e-6)
        return loss.rows

    watch = Watch(trainer, compare)
    trainer.train()
    assert watch.comes_apart and watch.groups == watch.result > 1


@pytest.mark.parametrize(("name", "options"), WHOLE, ids=str)
def test_a_loss_that_couples_rows_stays_whole(
    name: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    trainer = trainer_of(name, tmp_path, tokenizer, **options)
    watch = Watch(trainer)
    trainer.train()
    more = name in (
        "KTO",
        "DPO",
    )  # for values that the loss holds constant, or a comparison with one pass for both probes
    assert watch.comes_apart is False and lines_of(trainer)[1]["zo/forward_passes"] == 4 + 2 * more


@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward"])
def test_metrics_of_the_first_step_are_those_of_one_direction(name: str, tmp_path: Path, tokenizer: Any) -> None:
    lines = []
    for rows in (0, 1):
        trainer = trainer_of(name, tmp_path, tokenizer, learning_rate=1e-9, zo_eps=1e-5, zo_rows_per_direction=rows)
        trainer.train()
        lines.append(lines_of(trainer))
    (one, next_one), (by_rows, next_by_rows) = lines
    for key in set(one) - {"grad_norm", "zo/projected_grad", "zo/forward_passes"}:
        assert by_rows[key] == pytest.approx(one[key], rel=1e-5), key
    # From the second step on, they are those of a probe, and the direction is another one.
    assert (
        set(next_one) == set(next_by_rows) and next_one["num_tokens"] == next_by_rows["num_tokens"] > one["num_tokens"]
    )


@pytest.mark.parametrize("options", [{}, FREE], ids=["padded", "packed"])
def test_micro_batches_give_the_step_of_one_batch(options: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    ends = []
    for rows, micro_batches in ((4, 1), (2, 2)):
        trainer = trainer_of(
            "SFT",
            tmp_path,
            tokenizer,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            learning_rate=1e-3,
            zo_rows_per_direction=1,
            **options,
        )
        trainer.train()
        ends.append(weights_of(trainer.model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SFT", {}),
        ("SFT", FREE),
        ("SFT", {"loss_type": "dft"}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"]}),
        ("Reward", {}),
    ],
    ids=str,
)
def test_the_mean_estimate_is_the_gradient(name: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    options = {"max_steps": 1, "zo_subspace": "norms", "zo_target_modules": ["model.norm"], "zo_eps": 1e-3} | options
    trainer = trainer_of(name, tmp_path, tokenizer, zo_rows_per_direction=1, per_device_train_batch_size=8, **options)
    draws = 500

    def mean_estimate() -> torch.Tensor:
        inputs, items = first_batch(trainer)
        closure, _ = trainer._losses.of(trainer.model, MicroBatch(inputs, items, 1))
        (norm,) = trainer.zo.subspace.coordinates.values()
        total = torch.zeros(norm.shape)
        for step in range(draws):
            trainer.zo.step = step
            trainer.zo.estimate(closure)
            total += norm.grad
        return total / draws

    watch = Watch(trainer, in_step=mean_estimate)
    trainer.model.eval()
    inputs, items = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items)
    (gradient,) = torch.autograd.grad(loss, trainer.model.model.norm.weight)
    trainer.train()
    mean = watch.found
    assert watch.comes_apart and watch.groups == 8
    assert torch.cosine_similarity(mean, gradient, dim=0) > 0.99
    assert mean.norm().item() == pytest.approx(gradient.norm().item(), rel=0.1)
