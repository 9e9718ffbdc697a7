"""`RowLosses` of a closure: a direction for every row where the engine has them, else their mean."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import default_data_collator

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.parallel.launch import log_of, run
from tests.subspaces.helpers import sgd
from tests.trainer.runs import InOrder, SaveAt, make_trainer
from zo_hf import RowLosses
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.trajectory import read_trajectory, replay

ROWS, EPS = 6, 1e-2


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 8, generator=generator), torch.randint(3, (rows,), generator=generator)


def losses_of(model: nn.Module, rows: int = ROWS) -> Callable[[], RowLosses]:
    x, y = data(rows)
    return lambda: RowLosses(nn.functional.cross_entropy(model(x), y, reduction="none"))


def engine(model: nn.Module, rows_per_direction: int | str = 1, **options: Any) -> ZerothOrder:
    return ZerothOrder(
        model, options.pop("subspace", "low_rank"), eps=EPS, rows_per_direction=rows_per_direction, **options
    )


@pytest.mark.parametrize("rows_per_direction", [1, 2, "auto"])
@pytest.mark.parametrize("subspace", ["low_rank", "norms"])
def test_every_group_has_the_number_of_its_own_rows(subspace: str, rows_per_direction: int | str) -> None:
    model = seeded(network)
    zo = engine(model, rows_per_direction, subspace=subspace)
    estimate = zo.estimate(losses_of(model))
    x, y = data()
    groups = {1: 6, 2: 3, "auto": 6}[rows_per_direction]
    expected = []
    for group, (some_x, some_y) in enumerate(zip(x.chunk(groups), y.chunk(groups), strict=True)):
        ends = []
        for scale in (EPS, -EPS):
            with torch.no_grad(), zo.subspace.at((Probe(group, scale),), zo._stream, zo.distribution):
                ends.append(nn.functional.cross_entropy(model(some_x), some_y).item() / groups)
        expected.append((ends[0] - ends[1]) / (2 * EPS))
    assert estimate.projected_gradients == pytest.approx(expected, abs=1e-6 / EPS)
    assert zo.forward_passes == 1 + 2 + 3  # a look at the closure, the probes, and whether the rows are independent
    zo.discard()
    zo.estimate(losses_of(model))
    assert zo.forward_passes == 1 + 2 + 3 + 2


def test_a_rows_number_is_the_slope_of_its_share_along_its_direction() -> None:
    model = seeded(network, torch.float64)
    x, y = data()
    zo = ZerothOrder(model, "norms", eps=1e-4, rows_per_direction=1)
    sgd(zo, 0.0)

    def closure() -> RowLosses:
        return RowLosses(nn.functional.cross_entropy(model(x.double()), y, reduction="none"))

    found = zo.estimate(closure).projected_gradients
    assert zo.subspace.coordinate_blocks is not None
    (block,) = zo.subspace.coordinate_blocks
    with zo.subspace.differentiable() as leaves:
        losses = nn.functional.cross_entropy(model(x.double()), y, reduction="none") / ROWS
        for row, number in enumerate(found):
            parts = torch.autograd.grad(losses[row], leaves, retain_graph=True)
            slopes = block.layout.join(dict(zip(zo.subspace.coordinates, parts, strict=True)))
            direction = block.direction(zo._stream(row), zo.distribution)
            assert number == pytest.approx((slopes @ direction).item(), abs=1e-6)


def stepped(
    closure_of: Callable[[nn.Module], Callable[[], Any]], rows_per_direction: int | str, **options: Any
) -> Any:
    """The estimates of two steps, and the weights after them."""
    model = seeded(network)
    zo = engine(model, rows_per_direction, **options)
    optimizer = sgd(zo, 0.1)
    estimates = []
    for _ in range(2):
        estimates.append(zo.estimate(closure_of(model)))
        optimizer.step()
    zo.finish()
    return estimates, weights_of(model)


@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "forward_gradient"])
def test_without_rows_their_mean_is_the_loss(estimator: str) -> None:
    options = {"estimator": estimator, "batched": False, "subspace": "norms"}
    mean = lambda model: lambda: losses_of(model)().mean()  # noqa: E731
    found, expected = stepped(losses_of, 0, **options), stepped(mean, 0, **options)
    assert found[0] == expected[0]
    assert_same_bits(found[1], expected[1])


def test_the_same_steps_have_the_same_bits() -> None:
    first, second = stepped(losses_of, 1), stepped(losses_of, 1)
    assert first[0] == second[0]
    assert_same_bits(first[1], second[1])


def test_the_loss_of_an_estimate_is_the_mean() -> None:
    model = seeded(network)
    estimate = engine(model, 1).estimate(losses_of(model))
    with torch.no_grad():
        assert estimate.loss == pytest.approx(losses_of(model)().mean().item(), rel=1e-3)


def test_batches_of_other_sizes_come_apart_too() -> None:
    model = seeded(network)
    zo = engine(model, 1)
    optimizer = sgd(zo, 0.0)
    counts = []
    for rows in (6, 4, 5, 6):
        numbers = zo.estimate(losses_of(model, rows)).projected_gradients
        optimizer.step()
        assert len(numbers) == 6
        counts.append(sum(number != 0 for number in numbers))
    assert counts == [6, 4, 5, 6]


def test_a_resumed_engine_needs_no_second_look() -> None:
    numbers = []
    for resumes in (False, True):
        model = seeded(network)
        zo = engine(model, 1)
        optimizer = sgd(zo, 0.0)
        zo.estimate(losses_of(model))
        optimizer.step()
        if resumes:
            state = zo.state_dict()
            zo.subspace.detach()
            zo = engine(model, 1)
            sgd(zo, 0.0)
            zo.load_state_dict(state)
        numbers.append((zo.estimate(losses_of(model)).projected_gradients, zo.forward_passes))
    assert numbers[0] == numbers[1]


# Losses that do not come apart.


class Centered(nn.Module):
    """Subtracts the mean of the batch, so that every row depends on all."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Positions(nn.Module):
    """Adds a vector for every position; a batch with as many rows as positions takes the positions for rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, 8))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table[positions]


class Sequence(nn.Module):
    """Reads rows of as many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = Positions(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.positions(x[:, None].repeat(1, ROWS, 1), torch.arange(ROWS)).tanh()).sum(1)


@pytest.mark.parametrize("build", [lambda: nn.Sequential(Centered(), network(), Centered()), Sequence])
def test_rows_that_are_not_independent_keep_one_direction(
    build: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(build)
    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        estimate = engine(model, 1).estimate(losses_of(model))
    assert len(estimate.projected_gradients) == 1
    assert len([r for r in caplog.records if "all rows of a step share its directions" in r.message]) == 1


def contrastive(outputs: Tensor, losses: Tensor) -> Tensor:
    """Row i against all rows, as in CLIP."""
    similar = outputs @ outputs.roll(1, 1).t()
    return nn.functional.cross_entropy(similar, torch.arange(len(outputs)), reduction="none")


# A row's loss from the outputs of all rows and their own losses, (rows,).
DEPENDENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "on the next row": lambda outputs, losses: losses + torch.cat([losses[1:], losses[-1:] * 0]),
    "on the row before": lambda outputs, losses: losses + torch.cat([losses[:1] * 0, losses[:-1]]),
    "even on odd": lambda outputs, losses: losses.index_add(0, torch.arange(0, 7, 2), losses[1::2]),
    "odd on even": lambda outputs, losses: losses.index_add(0, torch.arange(1, 8, 2), losses[::2]),
    "halves": lambda outputs, losses: losses + losses.roll(4),
    "on the mean": lambda outputs, losses: 0.5 * losses + 0.5 * losses.mean(),
    "contrastive": contrastive,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("loss", DEPENDENT.values(), ids=DEPENDENT)
def test_a_loss_that_compares_rows_keeps_one_direction(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """With the default ε, at which a row moves its neighbor by less than rounding explains of the whole loss."""
    model = seeded(network, dtype)
    x, y = data(8)

    def closure() -> RowLosses:
        outputs = model(x.to(dtype)).float()
        return RowLosses(loss(outputs, nn.functional.cross_entropy(outputs, y, reduction="none")))

    zo = ZerothOrder(model, "low_rank", rows_per_direction=1)
    zo.estimate(closure)
    assert zo.row_groups is not None and zo.row_groups.comes_apart is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_positions_that_are_looked_up_once_are_no_rows(dtype: torch.dtype) -> None:
    """Also where they divide into as many parts as there are groups."""
    table = seeded(lambda: nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(16, 8), nn.Linear(8, 3)]), dtype)
    ids, y = torch.arange(8 * 16).view(8, 16) % 50, data(8)[1]

    def closure() -> RowLosses:
        tokens, positions, head = table
        return RowLosses(
            nn.functional.cross_entropy(
                head((tokens(ids) + positions(torch.arange(16))).tanh().mean(1)).float(), y, reduction="none"
            )
        )

    zo = ZerothOrder(table, "low_rank", rows_per_direction=1)
    zo.estimate(closure)
    assert zo.row_groups is not None and zo.row_groups.comes_apart is False


def test_a_closure_of_one_number_keeps_one_direction() -> None:
    model = seeded(network)
    zo = engine(model, 1)
    for _ in range(2):
        assert len(zo.estimate(lambda: losses_of(model)().mean()).projected_gradients) == 1
    assert zo.forward_passes == 1 + 2 + 2


def test_a_bare_vector_is_refused() -> None:
    model = seeded(network)
    for rows_per_direction in (0, 1):
        with pytest.raises(ValueError, match=r"the loss has shape \(6,\).* or return RowLosses"):
            engine(seeded(network), rows_per_direction).estimate(lambda: torch.Tensor(losses_of(model)()))


@pytest.mark.parametrize("losses", [torch.zeros(()), torch.zeros(2, 3), torch.zeros(0), [1.0, 2.0]])
def test_what_is_no_loss_for_every_row_is_refused(losses: Any) -> None:
    with pytest.raises(ValueError, match="RowLosses takes a tensor with one loss for every row"):
        RowLosses(losses)


def test_what_is_computed_from_the_losses_is_a_plain_tensor() -> None:
    losses = RowLosses(torch.arange(4.0))
    assert type(losses.mean()) is type(losses.detach()) is type(losses * 2) is Tensor


# A Trainer's compute_loss.


class LastToken(InOrder):
    """Returns the loss of every row's last token."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses = nn.functional.cross_entropy(outputs.logits[:, -2], inputs["labels"][:, -1], reduction="none")
        loss = self.reduced(losses)
        return (loss, outputs) if return_outputs else loss

    def reduced(self, losses: Tensor) -> Tensor:
        return RowLosses(losses)


class FewerLosses(LastToken):
    """Leaves a row out."""

    def reduced(self, losses: Tensor) -> Tensor:
        return RowLosses(losses[1:])


class Detached(LastToken):
    """Has a slope but no other value than 1, if detached values move with the probe."""

    def reduced(self, losses: Tensor) -> Tensor:
        return RowLosses(losses / losses.detach())


OPTIONS = {"max_steps": 3, "zo_fold_steps": 2, "zo_rank": 2, "zo_eps": 1e-2}


def test_compute_loss_gives_every_row_a_direction_however_a_step_is_divided(tmp_path: Path) -> None:
    found = []
    for kind, rows, micro_batches in ((LastToken, 8, 1), (LastToken, 2, 4), (InOrder, 8, 1)):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        trainer = make_trainer(tmp_path / f"{kind.__name__}{rows}", kind=kind, **OPTIONS, **options)
        trainer.train()
        numbers = [r.projected_gradients for r in read_trajectory(trainer.args.output_dir).records]
        assert [len(of_step) for of_step in numbers] == [8] * 3
        found.append([*sum(numbers, ()), trainer.evaluate()["eval_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)
    assert found[0] == pytest.approx(found[2], rel=1e-2, abs=1e-3)  # the model's own loss, which is the same


def test_detached_values_of_row_losses_stay_those_of_the_current_point(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kind=Detached, **OPTIONS)
    trainer.train()
    records = read_trajectory(tmp_path).records
    assert all(len(r.projected_gradients) == 8 and any(r.projected_gradients) for r in records)


def test_resume_and_replay_have_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, kind=LastToken, more={"callbacks": [SaveAt(2)]}, **OPTIONS)
    whole.train()
    assert_same_bits(weights_of(replay(seeded(tiny_opt), tmp_path)), weights_of(whole.model))
    resumed = make_trainer(tmp_path, kind=LastToken, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize(("kind", "rows_per_direction"), [(FewerLosses, "auto"), (LastToken, 0)])
def test_a_trainer_with_other_rows_keeps_one_direction(tmp_path: Path, kind: type, rows_per_direction: Any) -> None:
    trainer = make_trainer(tmp_path, kind=kind, zo_rows_per_direction=rows_per_direction, **OPTIONS)
    trainer.train()
    assert [len(r.projected_gradients) for r in read_trajectory(tmp_path).records] == [1] * 3


def test_an_input_without_rows_may_come_first(tmp_path: Path) -> None:
    """Such as the weights of classes, which a collator adds to the batch."""

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {"class_weights": torch.ones(3)} | default_data_collator(rows)

    more = {"data_collator": collate}
    trainer = make_trainer(tmp_path, kind=LastToken, more=more, remove_unused_columns=False, **OPTIONS)
    trainer.train()
    assert {len(r.projected_gradients) for r in read_trajectory(tmp_path).records} == {8}


def test_compute_loss_func_may_return_them(tmp_path: Path) -> None:
    def last_token(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> RowLosses:
        return RowLosses(nn.functional.cross_entropy(outputs["logits"][:, -2], labels[:, -1], reduction="none"))

    own, found = [], []
    for folder, kind, more in (("own", LastToken, {}), ("function", InOrder, {"compute_loss_func": last_token})):
        trainer = make_trainer(tmp_path / folder, kind=kind, more=more, **OPTIONS)
        trainer.train()
        (own if folder == "own" else found).extend(
            c for r in read_trajectory(tmp_path / folder).records for c in r.projected_gradients
        )
    assert len(own) == 3 * 8
    assert found == pytest.approx(own, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["two_point", "one_sided"])
def test_ranks_of_which_one_has_fewer_losses_agree_on_one_direction(tmp_path: Path, estimator: str) -> None:
    """And end at the same step of a budget. The loss detaches something, which the ranks must agree about as well."""
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import os
from tests.evaluation.test_row_losses import OPTIONS, FewerLosses, LastToken
from tests.trainer.runs import logged, make_trainer

class Detaches:
    def reduced(self, losses):
        self.metric = losses.detach().mean()
        return super().reduced(losses)

kind = FewerLosses if os.environ["RANK"] == "1" else LastToken
options = OPTIONS | {{"max_steps": 20, "zo_max_forward_passes": 12, "zo_estimator": "{estimator}"}}
trainer = make_trainer({str(tmp_path / "run")!r}, kind=type("Own", (Detaches, kind), {{}}), **options)
trainer.train()
print("steps", trainer.state.global_step, logged(trainer, "zo/forward_passes"))
"""
    )
    run(script, 2)
    first, second = (
        [line for line in log_of(script, rank).read_text().splitlines() if line.startswith("steps ")]
        for rank in (0, 1)
    )
    assert first == second != []
    assert {len(r.projected_gradients) for r in read_trajectory(tmp_path / "run").records} == {1}
