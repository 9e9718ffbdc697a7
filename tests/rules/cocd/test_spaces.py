"""The same path in every kind of coordinates, several probes in one forward pass, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, weights_of
from tests.quantized_models import quantize
from tests.rules.cocd.helpers import regression, run
from tests.subspaces.helpers import loss_of
from tests.trainer.runs import config, make_trainer, with_lora
from zo_hf.directions import unit_vectors
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.rng import Stream
from zo_hf.rules import RuleOptions
from zo_hf.subspaces import SUBSPACES, Adapter, Core, Full, FullInMemory, LowRank, Norms, Scales, Subspace


def with_prompt(model: nn.Module) -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def space(name: str, dtype: torch.dtype = torch.float32) -> Subspace:
    """Few coordinates of a small language model."""
    model = seeded(tiny_llama, dtype)
    few = {"target_modules": r".*layers\.0.*proj.*"}
    if name == "lora":
        return Adapter(with_lora(model, r=1, target_modules=["q_proj", "v_proj"]))
    made = {
        "norms": lambda: Norms(model),
        "core": lambda: Core(model, 3, 0, **few),
        "low_rank": lambda: LowRank(model, 1, 0, **few),
        "prompt": lambda: Adapter(with_prompt(model)),
        "scales": lambda: Scales(quantize(model), **few),
        "full": lambda: FullInMemory(model, target_modules=r".*norm.*"),
    }
    return made[name]()


EVERY_SPACE = pytest.mark.parametrize("name", ["norms", "core", "low_rank", "lora", "prompt", "scales", "full"])


def closure(subspace: Subspace) -> ModelLoss:
    in_front = 3 if hasattr(getattr(subspace.model, "prompt_encoder", None), "values") else 0
    return loss_of(subspace.model, causal_batch(2), in_front=in_front)


@EVERY_SPACE
def test_a_difference_is_the_slope_along_the_next_coordinates(name: str) -> None:
    """Against the same loss with that one coordinate written by hand."""
    subspace = space(name)
    n, per_step = subspace.dimension, 3
    assert n < 1000
    zo = ZerothOrder(
        subspace.model,
        subspace,
        eps=0.05,
        num_directions=per_step,
        estimator="coordinate",
        rule="cocd",
        batched_probes=False,
    )
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.0))
    loss = closure(subspace)
    zo.step = n // per_step - 1  # the turns go round the end of the cycle
    flat = [(c, i) for c in subspace.coordinates.values() for i in range(c.numel())]
    for _ in range(2):
        turns = [(zo.step * per_step + i) % n for i in range(per_step)]
        measured = zo.estimate(loss).projected_gradients
        optimizer.step()
        for turn, c in zip(turns, measured, strict=True):
            coordinate, index = flat[turn]
            values = []
            for sign in (1, -1):
                saved = coordinate.detach().clone()
                with torch.no_grad():
                    coordinate.view(-1)[index] += sign * 0.05
                    # At a probe of no length, for the layers of a quantized model compute otherwise between probes.
                    with subspace.at((Probe(0, 0.0),), zo._stream, zo.distribution):
                        values.append(float(loss()))
                    coordinate.copy_(saved)
            assert c == pytest.approx((values[0] - values[1]) / 0.1, abs=2e-5)


@EVERY_SPACE
def test_half_precision_weights_do_not_drift_and_the_coordinates_are_float32(name: str) -> None:
    if name == "full":
        with pytest.raises(ValueError, match=r"'full'.*bfloat16; load the model in float32"):
            space(name, torch.bfloat16)
        return
    subspace = space(name, torch.bfloat16)
    assert {c.dtype for c in subspace.coordinates.values()} == {torch.float32}
    zo = ZerothOrder(
        subspace.model, subspace, eps=1.0, num_directions=4, estimator="coordinate", rule="cocd", batched_probes=False
    )
    zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.0))
    before = weights_of(subspace.model)
    for _ in range(10):
        zo.estimate(closure(subspace))
        zo.step += 1
    assert_same_bits(weights_of(subspace.model), before)


@pytest.mark.parametrize("estimator", ["coordinate", "coordinate_forward"])
@pytest.mark.parametrize("name", ["norms", "core", "low_rank", "lora", "full"])
def test_in_one_batch_the_differences_are_the_same(name: str, estimator: str) -> None:
    measured = []
    for batched in (True, False):
        subspace = space(name)
        zo = ZerothOrder(
            subspace.model, subspace, eps=0.1, num_directions=5, estimator=estimator, batched_probes=batched
        )
        measured.append(zo.estimate(closure(subspace)).projected_gradients)
    assert max(map(abs, measured[1])) > 1e-4
    assert measured[0] == pytest.approx(measured[1], abs=2e-5)


def test_a_network_of_linear_layers_in_one_product_gives_the_same_differences() -> None:
    class Batch:
        rows = 6

        def __init__(self, model: nn.Module) -> None:
            self.model, self.x = model, torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))

        def __call__(self) -> torch.Tensor:
            return self.model(self.x).square().mean()

        def batched(self, copies: int) -> torch.Tensor:
            return self.model(self.x.repeat(copies, 1, 1)).square().view(copies, -1).mean(1)

    measured = []
    for batched in (True, False):
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        model[2].bias.requires_grad_(False)
        zo = ZerothOrder(model, "full", eps=0.1, num_directions=34, estimator="coordinate", batched_probes=batched)
        measured.append(zo.estimate(Batch(model)).projected_gradients)
    assert min(map(abs, measured[1][20:])) > 1e-3, "behind the last nonlinearity every slope counts"
    assert measured[0] == pytest.approx(measured[1], abs=2e-5)


def test_only_b_moves_of_a_lora_that_begins_at_zero() -> None:
    subspace = space("lora")
    zo = ZerothOrder(subspace.model, subspace, num_directions=4, estimator="coordinate", rule="cocd")
    assert all("lora_B" in name for name in zo.distribution.names)
    assert zo.distribution.dimension == 2 * (32 + 16), "q and v of two layers, rank 1"


def test_a_new_basis_forgets_the_differences() -> None:
    model = seeded(tiny_llama)
    subspace = LowRank(model, 1, fold_steps=4, target_modules=r".*q_proj.*")
    zo = ZerothOrder(model, subspace, eps=0.5, num_directions=3, estimator="coordinate", rule="cocd")
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2))
    loss = closure(subspace)
    for step in range(5):
        zo.estimate(loss)
        moved = sum(int(c.grad.count_nonzero()) for c in subspace.coordinates.values())
        assert moved == 3 * (step % 4 + 1)
        optimizer.step()


def test_coordinates_on_two_devices_or_of_two_dtypes_are_one_flat_vector() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(2, 2, bias=False) for _ in range(3))
            self.b.double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).sum().double() + 10 * self.b(x.double()).sum() + 100 * self.c(x).sum().double()

    model = Two()
    zo = ZerothOrder(model, "full", eps=0.5, num_directions=12, estimator="coordinate", rule="cocd")
    zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.0))
    slopes = zo.estimate(lambda: model(torch.ones(1, 2))).projected_gradients
    assert slopes == pytest.approx([1] * 4 + [10] * 4 + [100] * 4, rel=1e-4)
    assert [float(p.grad.mean()) for p in model.parameters()] == pytest.approx([1, 10, 100], rel=1e-4)
    assert [p.grad.dtype for p in model.parameters()] == [torch.float32, torch.float64, torch.float32]


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    model, _ = regression()
    cases = [
        ({"estimator": "two_point"}, r"zo_rule='cocd'.*zo_estimator='two_point'.*use zo_estimator='coordinate'"),
        ({"num_directions": 18}, r"zo_num_directions=18 exceeds the number of coordinates, 17"),
        (
            {"num_directions": 4, "cocd_memory": 3},
            r"zo_cocd_memory=3 must be between zo_num_directions=4",
        ),
        ({"cocd_memory": 18}, r"zo_cocd_memory=18.*number of coordinates, 17"),
        ({"direction": "rademacher"}, r"zo_direction='rademacher' has no effect.*leave it out"),
        ({"coordinate_order": "random"}, r"zo_coordinate_order='random' must be one of cyclic, permuted"),
        (
            {"subspace": Full(model)},
            r"zo_estimator='coordinate' does not combine with a Full subspace: it needs coordinates with a gradient",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            ZerothOrder(model, **{"subspace": "full", "estimator": "coordinate", "rule": "cocd"} | options)


@pytest.mark.parametrize("decay", [1.1, -0.1, float("nan")])
def test_a_decay_that_would_grow_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"zo_cocd_decay={decay}"):
        RuleOptions(cocd_decay=decay)


def test_the_trainer_refuses_too(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"optim=.*adamw.*zo_rule='cocd'"):
        config(tmp_path, zo_rule="cocd", zo_estimator="coordinate", optim="adamw_torch")
    with pytest.raises(ValueError, match="zo_coordinate_order='x'"):
        config(tmp_path, zo_coordinate_order="x")
    with pytest.raises(ValueError, match="needs gradients"):
        config(tmp_path, zo_subspace="full", optim="adamw_torch")
    with pytest.raises(
        ValueError, match="zo_rule='cocd' does not combine with zo_estimator='two_point': the rule needs numbers"
    ):
        make_trainer(tmp_path, zo_rule="cocd").train()


def test_without_the_rule_any_optimizer_takes_the_differences(tmp_path) -> None:
    trainer = make_trainer(
        tmp_path, zo_subspace="full", zo_estimator="coordinate", zo_target_modules=r".*norm.*", optim="adamw_torch"
    )
    trainer.train()
    assert trainer.state.log_history[0]["zo/forward_passes"] >= 2


def test_the_pointer_is_the_step() -> None:
    units = unit_vectors({"a": torch.zeros(2, 2), "b": torch.zeros(3)}, 3, "cyclic", 0)
    turns = [units.place(Stream(0, step, i)) for step in range(3) for i in range(3)]
    assert turns == [("a", i) for i in range(4)] + [("b", i) for i in range(3)] + [("a", 0), ("a", 1)]
    assert units.cycles(7) == 3.0


def test_every_subspace_is_covered() -> None:
    assert set(SUBSPACES) == {"norms", "core", "low_rank", "adapter", "scales", "full"}, "then add it above"
    assert run(*regression(), 1, 1, 0.1)[0].subspace.name == "full"
