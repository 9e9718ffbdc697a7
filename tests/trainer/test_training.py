"""Training learns, logs what happened, and leaves a plain model behind."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import (
    CAUSAL_MODELS,
    TinyTask,
    assert_same_bits,
    seeded,
    tiny_bert,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    weights_of,
)
from tests.trainer.runs import At, Recorder, logged, make_trainer, trained, with_coordinates, with_lora
from zo_hf import ZerothOrder, ZOSeq2SeqTrainer
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.model_loss import only_labeled_logits
from zo_hf.subspaces import SUBSPACES
from zo_hf.trainer.trainer import ZOTrainer

LEARNING = {"per_device_train_batch_size": 16, "zo_fold_steps": 50, "zo_normalize": True, "logging_steps": 50}


class Relabeled(torch.utils.data.Dataset):
    """`TinyTask` for models that are not causal: `label(row)` in place of its labels."""

    def __init__(self, label: Any) -> None:
        self.task, self.label = TinyTask(), label

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.task[index])
        row["labels"] = self.label(row["labels"][-1])
        return row


def losses_around(trainer: ZOTrainer) -> tuple[float, float]:
    """The evaluation loss before and after training."""
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("name", "subspace", "steps", "lr"),
    [
        ("opt", "low_rank", 30, 1e-2),
        ("opt", "full", 20, 1e-2),
        ("opt", "adapter", 60, 3e-2),
        ("llama", "low_rank", 70, 1e-2),
        ("gpt2", "low_rank", 30, 1e-2),
        ("mixtral", "low_rank", 100, 5e-3),  # which a longer step sends from expert to expert
    ],
)
def test_the_evaluation_loss_falls(tmp_path: Path, name: str, subspace: str, steps: int, lr: float) -> None:
    model = seeded(CAUSAL_MODELS[name], **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1})
    if subspace == "adapter":
        model = with_lora(model)
    trainer = make_trainer(tmp_path, model, zo_subspace=subspace, max_steps=steps, **LEARNING | {"learning_rate": lr})
    before, after = losses_around(trainer)
    assert after < before - 0.25


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_bf16_weights_learn_and_stay_bf16(tmp_path: Path, subspace: str) -> None:
    model = seeded(tiny_opt, torch.bfloat16, num_hidden_layers=1)
    trainer = make_trainer(tmp_path, model, zo_subspace=subspace, max_steps=30, **LEARNING)
    before, after = losses_around(trainer)
    assert after < before - 0.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bf16_weights_move_by_updates_below_their_rounding(tmp_path: Path) -> None:
    """Thirty steps of 1e-6 per coordinate are far below the last place of a bf16 weight of 0.02."""
    model = seeded(tiny_opt, torch.bfloat16)
    before = weights_of(model)
    trained(tmp_path, model, max_steps=30, learning_rate=1e-6, zo_normalize=True, zo_fold_steps=10)
    name = "model.decoder.layers.0.fc1.weight"
    moved = (model.state_dict()[name] != before[name]).float().mean().item()
    assert 0.005 < moved < 0.5


def test_a_classifier_learns_its_own_loss(tmp_path: Path) -> None:
    data = Relabeled(lambda token: int(token) - 5)
    more = {"train_dataset": data, "eval_dataset": data}
    before, after = losses_around(make_trainer(tmp_path, seeded(tiny_bert), more=more, max_steps=300, **LEARNING))
    assert after < before - 0.05


def test_seq2seq_learns_and_generates_in_predict(tmp_path: Path) -> None:
    data = Relabeled(lambda token: torch.stack([token, torch.tensor(1)]))
    options = LEARNING | {"max_steps": 100, "predict_with_generate": True, "generation_max_length": 4}
    more = {"train_dataset": data, "eval_dataset": data}
    trainer = make_trainer(tmp_path, seeded(tiny_t5), ZOSeq2SeqTrainer, more, **options)
    before, after = losses_around(trainer)
    assert after < before - 0.5
    predicted = trainer.predict(data)
    ids = torch.stack([data[index]["input_ids"] for index in range(len(data))])
    generated = trainer.model.generate(ids, max_length=4)
    assert (predicted.predictions[:, : generated.shape[1]] == generated.numpy()).all()
    first = torch.from_numpy(predicted.predictions[:, 1])
    assert ((first == 5) | (first == 6)).float().mean() > 0.8
    assert predicted.metrics["test_loss"] == pytest.approx(after)


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_under_autocast_the_losses_are_those_of_a_fresh_context_per_probe(tmp_path: Path, subspace: str) -> None:
    """A context shared by both probes would reuse the first one's half-precision casts."""

    def build() -> nn.Module:
        model = seeded(tiny_llama)
        return with_lora(model) if subspace == "adapter" else model

    batches = Recorder()
    trainer = trained(
        tmp_path,
        build(),
        more={"data_collator": batches},
        zo_subspace=subspace,
        zo_batched_probes=False,
        zo_rows_per_direction=0,
        zo_eps=1e-2,
        max_steps=1,
        bf16=True,
    )
    model = build()
    engine = ZerothOrder(model, subspace, eps=1e-2, batched_probes=False, seed=trainer.args.seed)
    inner = model.get_base_model() if subspace == "adapter" else model
    inputs = only_labeled_logits(inner, batches.batches[0])
    losses = []
    for scale in (1e-2, -1e-2):
        with (
            torch.no_grad(),
            engine.subspace.at((Probe(0, scale),), engine._stream, engine.distribution),
            torch.autocast("cpu", torch.bfloat16),
        ):
            losses.append(model(**inputs, num_items_in_batch=8).loss.item())
    engine.finish()
    assert losses[0] != losses[1]
    assert logged(trainer, "zo/projected_grad")[0] * 2e-2 == pytest.approx(losses[0] - losses[1], abs=3e-6)
    assert logged(trainer, "loss")[0] == pytest.approx(sum(losses) / 2, abs=3e-6)


@pytest.mark.parametrize("directions", [1, 3])
def test_every_logged_number_is_that_of_its_step(tmp_path: Path, directions: int) -> None:
    batches, steps = Recorder(), 5
    options = {"max_steps": steps, "learning_rate": 1e-3, "zo_num_directions": directions, "zo_fold_steps": 0}
    options |= {"zo_batched_probes": False, "zo_rows_per_direction": 0}
    trainer, notes = with_coordinates(tmp_path, more={"data_collator": batches}, **options)

    model = seeded(tiny_opt)
    engine = ZerothOrder(
        model,
        SUBSPACES["low_rank"](model, fold_steps=0, seed=42),
        num_directions=directions,
        batched_probes=False,
        seed=42,
    )
    optimizer = engine.prepare(torch.optim.SGD(engine.coordinates(), lr=1e-3))
    for step, batch in enumerate(batches.batches[:steps]):
        inputs = only_labeled_logits(model, batch)
        estimate = engine.estimate(lambda inputs=inputs: model(**inputs, num_items_in_batch=8).loss)
        optimizer.step()
        assert logged(trainer, "loss")[step] == pytest.approx(estimate.loss, rel=1e-6)
        expected = sum(estimate.projected_gradients) / directions
        assert logged(trainer, "zo/projected_grad")[step] == pytest.approx(expected, rel=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx([length / 1e-3 for length in notes.lengths], rel=1e-4)
    assert logged(trainer, "zo/forward_passes") == [2 * directions * (step + 1) for step in range(steps)]
    assert logged(trainer, "zo/skipped_steps") == [0] * steps


@pytest.mark.parametrize(("rows_per_direction", "check"), [(0, 2), ("auto", 5)])
def test_auto_counts_the_forward_passes_of_its_check(tmp_path: Path, rows_per_direction: Any, check: int) -> None:
    options = {"zo_batched_probes": "auto", "zo_rows_per_direction": rows_per_direction}
    trainer = trained(tmp_path, max_steps=2, **options)
    assert logged(trainer, "zo/forward_passes") == [2 + check, 4 + check]


def test_full_logs_the_expected_norm_of_its_update(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=2, zo_subspace="full", learning_rate=1e-4)
    dimension = sum(p.numel() for p in trainer.model.parameters())
    expected = [abs(c) * dimension**0.5 for c in logged(trainer, "zo/projected_grad")]
    assert logged(trainer, "grad_norm") == pytest.approx(expected)


def assert_plain(model: nn.Module, like: nn.Module) -> None:
    """No trace of training but other values: the same tensors by name, and every module's own forward."""
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == []
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in like.named_modules()]
    assert model.state_dict().keys() == like.state_dict().keys()
    for (name, parameter), (other, reference) in zip(model.named_parameters(), like.named_parameters(), strict=True):
        assert name == other
        assert type(parameter) is type(reference) and parameter.requires_grad == reference.requires_grad
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_after_training_the_model_is_plain(tmp_path: Path, subspace: str) -> None:
    def build() -> nn.Module:
        return with_lora(seeded(tiny_opt)) if subspace == "adapter" else seeded(tiny_opt)

    model = build()
    identities = {name: id(p) for name, p in model.named_parameters()}
    trainer = trained(tmp_path, model, zo_subspace=subspace)
    assert trainer.zo is None and trainer.model is model
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert_plain(model, build())


def test_nothing_wraps_the_model_while_it_trains(tmp_path: Path) -> None:
    model = seeded(tiny_opt)
    look = At(None, lambda state, **kwargs: (kwargs["model"], trainer.model_wrapped))
    trainer = make_trainer(tmp_path, model, more={"callbacks": [look]}, max_steps=2)
    trainer.train()
    assert len(look.results) == 2
    assert all(seen is model and wrapped is model for seen, wrapped in look.results)


class Interrupted(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("subspace", "error"),
    [
        ("low_rank", Interrupted),
        ("low_rank", KeyboardInterrupt),
        ("full", KeyboardInterrupt),
        ("adapter", KeyboardInterrupt),
    ],
)
def test_an_exception_leaves_a_plain_model_with_the_steps_that_were_done(
    tmp_path: Path, subspace: str, error: type[BaseException]
) -> None:
    def build() -> nn.Module:
        model = seeded(tiny_opt, num_hidden_layers=1)
        return with_lora(model) if subspace == "adapter" else model

    def fail(state: Any, **kwargs: Any) -> None:
        raise error

    model, reference = build(), build()
    trainer = make_trainer(tmp_path, model, more={"callbacks": [At({4}, fail)]}, zo_subspace=subspace, max_steps=9)
    with pytest.raises(error):
        trainer.train()
    assert trainer.zo is None
    assert_plain(model, build())
    trained(tmp_path, reference, zo_subspace=subspace, max_steps=4)
    assert_same_bits(weights_of(model), weights_of(reference))


def test_an_exception_in_a_probe_leaves_the_weights_of_the_last_step(tmp_path: Path) -> None:
    class Fails(ZOTrainer):
        last = 5  # the sixth is the second probe of the third step

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.calls = itertools.count(1)
            super().__init__(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if next(self.calls) > self.last:
                raise Interrupted
            return super().compute_loss(*args, **kwargs)

    class Works(Fails):
        last = 1000

    model, reference = (seeded(tiny_opt, num_hidden_layers=1) for _ in range(2))
    trainer = make_trainer(tmp_path, model, Fails, max_steps=9, zo_subspace="full")
    with pytest.raises(Interrupted):
        trainer.train()
    assert_plain(model, seeded(tiny_opt, num_hidden_layers=1))
    trained(tmp_path, reference, Works, max_steps=2, zo_subspace="full")
    assert_same_bits(weights_of(model), weights_of(reference))


def test_training_again_continues_from_the_trained_weights(tmp_path: Path) -> None:
    model = seeded(tiny_opt)
    trainer = make_trainer(tmp_path, model, max_steps=4)
    trainer.train()
    first = weights_of(model)
    continued = seeded(tiny_opt)
    continued.load_state_dict(first)
    trainer.train()
    trained(tmp_path / "other", continued, max_steps=4)
    assert_same_bits(weights_of(model), weights_of(continued))


def test_the_global_random_state_is_not_touched(tmp_path: Path) -> None:
    def state_of_torch(state: Any, **kwargs: Any) -> torch.Tensor:
        return torch.random.get_rng_state()

    look = At(None, state_of_torch)
    trained(tmp_path, more={"callbacks": [look]}, max_steps=5)
    # All in one epoch, at whose start the data loader draws.
    assert all(torch.equal(look.results[0], state) for state in look.results[1:])
