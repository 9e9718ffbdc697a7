"""Every estimator in a Trainer: it learns, is killed and goes on, and is replayed, to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.estimators.quadratic import ALONG_NOISE
from tests.parallel.launch import run
from tests.trainer.runs import SaveAt, logged, make_trainer, trained, with_lora
from zo_hf.trajectory import read_trajectory, replay

SHARED = ("one_sided", "fzoo")


def build(subspace: str = "low_rank") -> nn.Module:
    model = seeded(partial(tiny_opt, num_hidden_layers=1), attn_implementation="eager")
    return with_lora(model) if subspace == "adapter" else model


def options(estimator: str, **more: Any) -> dict[str, Any]:
    rate = {"fzoo": 1e-6, "evolution": 1e-3, "evolution_ranks": 1e-3}.get(estimator, 1e-3)
    given = {"zo_estimator": estimator, "zo_num_directions": 3, "learning_rate": rate, "max_steps": 5}
    return given | {"zo_rows_per_direction": 0} | more


@pytest.mark.parametrize(
    ("estimator", "subspace"),
    [("one_sided", "low_rank"), ("forward_gradient", "full")]
    # tests/methods/test_trainer.py has every estimator once.
    + [pytest.param(name, "adapter", marks=pytest.mark.slow) for name in ("one_sided", "forward_gradient")],
)
def test_a_run_resumes_and_replays_to_the_bit(tmp_path: Path, estimator: str, subspace: str) -> None:
    """With micro-batches, from a checkpoint between two folds, and from the log alone without a forward pass."""
    given = options(estimator, zo_subspace=subspace, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    run = trained(tmp_path / "run", build(subspace), more={"callbacks": [SaveAt(2)]}, **given)
    after = weights_of(run.model)
    start = weights_of(build(subspace))
    assert any(not torch.equal(after[name], start[name]) for name in start)

    again = trained(tmp_path / "again", build(subspace), resume=str(tmp_path / "run" / "checkpoint-2"), **given)
    assert_same_bits(weights_of(again.model), after)
    for key in ("loss", "zo/projected_grad", "zo/forward_passes"):
        assert logged(again, key) == logged(run, key)

    base = build(subspace)
    base.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    assert_same_bits(weights_of(replay(base, tmp_path / "run")), after)
    trajectory = read_trajectory(tmp_path / "run")
    assert trajectory.header["settings"]["zo_estimator"] == estimator
    means = [sum(record.projected_gradients[:3]) / 3 for record in trajectory.records]
    assert means == pytest.approx(logged(run, "zo/projected_grad"), rel=1e-12)


def test_a_checkpoint_is_not_continued_with_another_estimator(tmp_path: Path) -> None:
    estimator, other = "fzoo", "one_sided"
    trained(tmp_path, build(), more={"callbacks": [SaveAt(1)]}, **options(estimator, max_steps=1))
    with pytest.raises(ValueError, match=rf"zo_estimator='{estimator}'"):
        trained(tmp_path / "other", build(), resume=str(tmp_path / "checkpoint-1"), **options(other))


@pytest.mark.parametrize(
    ("estimator", "batched"), [(name, False) for name in ALONG_NOISE] + [("two_point", "auto"), ("one_sided", "auto")]
)
def test_the_log_says_what_a_step_cost_and_where_the_loss_was(tmp_path: Path, estimator: str, batched: Any) -> None:
    """The first logged loss, with micro-batches, is that of the untouched model where it is evaluated there."""
    given = options(estimator, gradient_accumulation_steps=2, per_device_train_batch_size=4, zo_eps=0.05)
    model, calls = build(), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    trainer = make_trainer(tmp_path, model, **given, zo_batched_probes=batched)
    seen: dict[tuple[int, ...], Tensor] = {}  # by micro-batch
    compute = trainer.compute_loss
    plain = build()

    def compute_loss(model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 0:
            # Not under no_grad, whose values the trainer keeps, by one more pass: gradients are off in a probe anyway.
            seen[tuple(inputs["input_ids"].flatten().tolist())] = plain(**inputs).loss
        return compute(model, inputs, *args, **kwargs)

    if batched is False:
        trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    trainer.train()
    kind = ALONG_NOISE[estimator](0.05, 3)
    passes = len(kind.probes())
    first = 2 if batched == "auto" and not kind.needs_tangents else 1  # evaluated both ways, to compare; then batched
    per_micro_batch = [first * passes] + [passes] * 9
    assert logged(trainer, "zo/forward_passes") == [sum(per_micro_batch[: 2 * i]) for i in range(1, 6)]
    if batched is False:
        # Three more find out how this loss uses num_items_in_batch, and whether it detaches values.
        assert calls == 5 * 2 * (3 if kind.needs_tangents else passes) + 3
        clean = torch.stack(list(seen.values())).mean().item()
        away = abs(logged(trainer, "loss")[0] - clean)
        assert (
            away < 1e-5 if estimator in ("one_sided", "fzoo", "second_difference", "forward_gradient") else away > 1e-5
        )


def test_fzoo_trains_with_its_own_learning_rate(tmp_path: Path) -> None:
    """The default would be a thousand times too long a step if it were the subspace's."""
    rates = {}
    for estimator in ("one_sided", "fzoo"):
        trainer = trained(tmp_path / estimator, build(), **options(estimator, learning_rate=None, max_steps=1))
        rates[estimator] = logged(trainer, "learning_rate")[0]
        assert trainer.args.learning_rate is None
    assert rates["fzoo"] == pytest.approx(rates["one_sided"] * 1e-3)


SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import TinyTask, weights_of
from tests.estimators.test_trainer import PARALLEL, SHARED, build
from tests.trainer.runs import logged, make_trainer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for estimator in SHARED:
    model = build()
    trainer = make_trainer(
        folder / estimator, model, more={"train_dataset": TinyTask()}, zo_parallel="directions", **PARALLEL[estimator]
    )
    trainer.train()
    result = {key: logged(trainer, key) for key in ("loss", "zo/forward_passes", "zo/projected_grad")}
    torch.save(result | {"weights": weights_of(model)}, folder / f"{estimator}-{rank}.pt")
"""
PARALLEL = {
    name: options(name, zo_num_directions=4, zo_eps=1e-2, gradient_accumulation_steps=2, zo_batched_probes=False)
    for name in SHARED
}


@pytest.mark.slow
def test_two_processes_share_the_directions_and_one_has_the_clean_probe(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    run(tmp_path / "run.py", 2, tmp_path, seconds=300)
    for estimator in SHARED:
        first, second = (torch.load(tmp_path / f"{estimator}-{rank}.pt") for rank in range(2))
        assert_same_bits(first["weights"], second["weights"])
        one = trained(tmp_path / "one", build(), more={"train_dataset": TinyTask()}, **PARALLEL[estimator])
        assert first["zo/forward_passes"] == logged(one, "zo/forward_passes") == [10, 20, 30, 40, 50]
        assert first["loss"] == pytest.approx(logged(one, "loss"), rel=1e-5)
        assert first["zo/projected_grad"] == pytest.approx(logged(one, "zo/projected_grad"), rel=1e-2, abs=1e-2)
