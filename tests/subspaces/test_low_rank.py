"""W + B·Vᵀ/√r: the fold, the direction, weight decay, and what is refused."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.conftest import assert_same_bits, seeded, tiny_gpt2, tiny_llama, tiny_opt, weights_of
from tests.subspaces.helpers import EVERY_MODEL, MODELS, basis, batch_for, direction, sgd
from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Stream
from zo_hf.subspaces import LowRank, fold_pieces


def moved(model: nn.Module, size: float = 0.02, **kwargs) -> LowRank:
    """A subspace of the model with random coordinates."""
    space = LowRank(model, **kwargs)
    generator = torch.Generator().manual_seed(4)
    for coordinate in space.coordinates.values():
        coordinate.data.normal_(std=size, generator=generator)
    space.attach()
    space.coordinates_changed()
    return space


# The fold.


@EVERY_MODEL
def test_fold_keeps_the_function(build) -> None:
    """Logits before and after agree to float32 rounding, and differ from those of the model without coordinates."""
    model = seeded(build)
    batch = batch_for(model)
    with torch.no_grad():
        plain = model(**batch)
        space = moved(model)
        before = model(**batch)
        space.fold(1, {})
        after = model(**batch)
    assert (before.logits - plain.logits).abs().max() > 0.01
    assert torch.allclose(before.logits, after.logits, rtol=1e-4, atol=1e-5)
    assert before.loss.item() == pytest.approx(after.loss.item(), rel=1e-5)
    assert not any(coordinate.any() for coordinate in space.coordinates.values())


@EVERY_MODEL
def test_fold_adds_the_coordinates_to_the_weights(build) -> None:
    """W + B·Vᵀ/√r of every matrix, W + b of everything else, computed here from the seed."""
    model = seeded(build, torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    space = moved(model, seed=6, rank=3)
    xi = {name: c.detach().clone() for name, c in space.coordinates.items()}
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    v = {name: basis(space, name) for name in space.factored}
    space.fold(1, {})
    assert xi.keys() == before.keys()
    for name, parameter in model.named_parameters():
        change = xi[name]
        if name in v:
            change = xi[name] @ v[name].t()
            change = change.t() if name in conv1d else change.reshape(parameter.shape)
        assert torch.allclose(parameter, before[name] + change, atol=1e-7), name
    matrices = {name for name, p in before.items() if p.ndim >= 2 and min(p.shape) > 3}
    assert matrices <= v.keys()


def test_fold_draws_a_new_basis_from_the_seed_and_the_step() -> None:
    model = seeded(tiny_opt)
    space = LowRank(model, seed=9)
    name = next(iter(space.factored))
    first = space.basis(name).clone()  # a fold writes into it
    assert torch.allclose(first, basis(space, name, 0), atol=1e-7)
    space.fold(50, {})
    assert torch.allclose(space.basis(name), basis(space, name, 50), atol=1e-7)
    assert not torch.equal(first, space.basis(name))


TIED = {"tie_word_embeddings": True}
FOLDED = {**MODELS, "llama tied": partial(tiny_llama, **TIED), "gpt2 tied": partial(tiny_gpt2, **TIED)}


@pytest.mark.parametrize("build", FOLDED.values(), ids=FOLDED)
@pytest.mark.parametrize(
    ("dtype", "decay"),
    [(torch.float32, 0.9), (torch.bfloat16, None), (torch.bfloat16, 0.9), (torch.float16, 0.9)],
    ids=["float32 decay", "bf16", "bf16 decay", "fp16 decay"],
)
def test_folded_state_dict_is_what_fold_writes_bit_for_bit(build, dtype: torch.dtype, decay: float | None) -> None:
    """A checkpoint written in the middle and the model a moment later must be the same, rounding included."""
    model = seeded(build, dtype)
    before = weights_of(model)
    space = moved(model, seed=1)
    owed = {} if decay is None else dict.fromkeys(space.factored, decay)
    folded = space.folded_state_dict(37, owed)
    assert_same_bits(weights_of(model), before)
    space.fold(37, owed)
    assert_same_bits(folded, weights_of(model))
    assert any(not torch.equal(folded[name], before[name]) for name in before)


def test_the_weights_of_an_adapter_stay_as_they_are_when_a_fold_writes_the_next_basis() -> None:
    subspace = LowRank(seeded(tiny_llama))
    taken = subspace.adapter_weights()
    copies = {name: a.clone() for name, (a, _) in taken.items()}
    subspace.fold(1, {})
    assert all(torch.equal(a, copies[name]) for name, (a, _) in taken.items())
    assert not any(torch.equal(a, copies[name]) for name, (a, _) in subspace.adapter_weights().items())


def test_tied_weights_stay_tied_through_a_fold() -> None:
    model = seeded(tiny_opt)
    space = moved(model)
    folded = space.folded_state_dict(1)
    assert folded["lm_head.weight"].data_ptr() == folded["model.decoder.embed_tokens.weight"].data_ptr()
    space.fold(1, {})
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_fold_is_unbiased(dtype: torch.dtype) -> None:
    """The mean over seeds is W + B·Vᵀ/√r, though a single update is a tenth of an ulp."""
    model = seeded(lambda: nn.Linear(12, 10, bias=False), dtype)
    model.weight.data.copy_(1.1 + 0.8 * torch.rand(10, 12, generator=torch.Generator().manual_seed(0)))
    weight = model.weight.detach().clone()
    ulp = torch.finfo(dtype).eps
    space = moved(model, 0.1 * ulp, rank=2)
    xi = space.coordinates["weight"].detach().clone()
    change = xi @ basis(space, "weight").to(dtype).float().t()
    folds = []
    for step in range(1000):
        space.draw_bases(0)
        space.coordinates["weight"].data.copy_(xi)
        model.weight.data.copy_(weight)
        space.fold(step, {})
        folds.append((model.weight.detach() - weight).double() / ulp)
    folds = torch.stack(folds)
    assert set(folds.unique().tolist()) == {-1.0, 0.0, 1.0}
    up = (change / ulp).double()
    error = (up.abs().clamp(min=0.01) * (1 - up.abs()) / len(folds)).sqrt()
    student = (folds.mean(0) - up) / error
    assert student.abs().max() < 6  # rare events: a little wider than a normal law
    assert (folds.mean() - up.mean()).abs() < 4 * error.square().mean().sqrt() / weight.numel() ** 0.5


@pytest.mark.parametrize("build", [tiny_opt, tiny_gpt2], ids=["opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
def test_a_fold_in_tiles_equals_the_whole(build, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are for memory alone: each gets its own part of B and of the rounding's bits."""
    folded = []
    for tile in (fold_pieces.TILE, 200):
        monkeypatch.setattr(fold_pieces, "TILE", tile)
        folded.append(moved(seeded(build, dtype)).folded_state_dict(5))
    for name, whole in folded[0].items():
        # A product of fewer rows may sum in another order, which moves a rounding now and then.
        differ = (whole - folded[1][name]).abs() > 1e-12
        assert differ.float().mean() < 1e-3, name


# The direction.


def test_the_update_rebuilt_from_the_seed() -> None:
    """ΔW = -η·c·U·Vᵀ/√r with U and V drawn here: on every step, of which each third redraws V."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 9), nn.LayerNorm(9)), torch.float64)
    zo = ZerothOrder(model, LowRank(model, rank=4, fold_steps=3, seed=8), seed=8)
    optimizer = sgd(zo, lr=1e-2)
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(8):
        z = direction(zo.subspace, step=step)
        drawn_at = step - step % 3
        before = zo.subspace.folded_state_dict(0)
        (c,) = zo.estimate(lambda: model(x).sin().sum()).projected_gradients
        optimizer.step()
        after = zo.subspace.folded_state_dict(0)
        for name in before:
            moved_by = z[name] @ basis(zo.subspace, name, drawn_at).t() if name == "0.weight" else z[name]
            assert torch.allclose(after[name] - before[name], -1e-2 * c * moved_by, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_an_entry_of_the_direction_has_unit_variance(rank: int, distribution: str) -> None:
    """So that ε and the learning rate mean what they mean for a dense direction, whatever r is."""
    model = nn.Linear(300, 400, bias=False)
    weight = model.weight.detach()
    draws = []
    for seed in range(40):
        zo = ZerothOrder(model, LowRank(model, rank=rank, seed=seed), eps=1.0, direction=distribution, seed=seed)
        with zo.subspace.at((Probe(0, 1.0),), zo._stream, zo.distribution), torch.no_grad():
            draws.append(model(torch.eye(300)).t() - weight)
        zo.subspace.detach()
    draws = torch.stack(draws)
    assert abs(draws.mean()) < 0.02
    # Entries of a draw share U and V; the error of their mean square is that of its m·r and n·r factors.
    error = math.sqrt((2 / 300 / rank + 2 / 400 / rank) / 40)
    assert draws.square().mean().item() == pytest.approx(1.0, abs=4 * error)


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_every_rank_is_usable(rank: int) -> None:
    """A matrix whose input dimension is not above r is moved densely."""
    model = seeded(tiny_opt)
    space = LowRank(model, rank=rank)
    assert all(c.shape[-1] == rank for name, c in space.coordinates.items() if name in space.factored)
    assert all(space.basis(name).shape[0] > rank for name in space.factored)
    dense = [c.shape == dict(model.named_parameters())[n].shape for n, c in space.coordinates.items()]
    assert len(space.factored) + sum(dense) == len(space.coordinates) == len(list(model.parameters()))
    batch = batch_for(model)
    zo = ZerothOrder(model, space)
    assert zo.estimate(lambda: model(**batch).loss).projected_gradients[0] != 0.0


# Weight decay.


def test_pending_decay_is_decoupled_weight_decay_at_the_fold() -> None:
    """W ← (1 - ηλ)·W - η·c·U·Vᵀ/√r step by step gives the same folded weight, under a schedule of η."""
    model = seeded(lambda: nn.Linear(12, 9), torch.float64)
    zo = ZerothOrder(model, LowRank(model, rank=4, fold_steps=3))
    optimizer = sgd(zo, lr=1e-2, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    for step in range(9):
        z = direction(zo.subspace, step=step)
        z["weight"] = z["weight"] @ basis(zo.subspace, "weight", step - step % 3).t()
        (c,) = zo.estimate(lambda: model(x).sin().sum()).projected_gradients
        lr = optimizer.param_groups[0]["lr"]
        weight = (1 - lr * 0.5) * weight - lr * c * z["weight"]
        bias = bias - lr * c * z["bias"]
        optimizer.step()
        schedule.step()
        if zo.step % 3 == 0:
            assert torch.allclose(model.weight, weight, rtol=1e-6, atol=1e-8)
            assert torch.allclose(model.bias, bias, rtol=1e-6, atol=1e-8)


def test_finish_pays_the_pending_decay() -> None:
    """A run that ends between two folds leaves the weights as decoupled decay does; a checkpoint there, too."""
    lr, decay = 1e-2, 0.5
    model = seeded(lambda: nn.Linear(12, 9, bias=False), torch.float64)
    zo = ZerothOrder(model, LowRank(model, rank=4, fold_steps=50))
    optimizer = sgd(zo, lr=lr, weight_decay=decay)
    weight = model.weight.detach().clone()
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        z = direction(zo.subspace, step=step)["weight"] @ basis(zo.subspace, "weight").t()
        (c,) = zo.estimate(lambda: model(x).sin().sum()).projected_gradients
        optimizer.step()
        weight = (1 - lr * decay) * weight - lr * c * z
    checkpoint = zo.subspace.folded_state_dict(zo.step, zo.state_dict()["pending_decay"])
    zo.finish()
    assert torch.allclose(model.weight, weight, rtol=1e-6, atol=1e-8)
    assert_same_bits(checkpoint, weights_of(model))
    assert zo.state_dict()["pending_decay"] == {}


def test_a_skipped_step_decays_nothing() -> None:
    """The optimizer leaves B alone in a step without a gradient, so the weights under it owe nothing either."""
    model = seeded(lambda: nn.Linear(12, 9))
    zo = ZerothOrder(model, LowRank(model, rank=2, fold_steps=2))
    optimizer = sgd(zo, lr=1e-2, weight_decay=0.5)
    before = weights_of(model)
    for _ in range(4):
        assert not zo.estimate(lambda: torch.tensor(math.nan)).is_finite
        optimizer.step()
    assert zo.skipped_steps == 4
    assert_same_bits(weights_of(model), before)


def test_norms_and_biases_are_not_decayed() -> None:
    model = seeded(tiny_llama)
    zo = ZerothOrder(model, LowRank(model))
    decayed, spared = zo.coordinates(weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(c): name for name, c in zo.subspace.coordinates.items()}
    assert {names[id(p)] for p in spared["params"]} == {n for n in names.values() if "norm" in n}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


# Which parameters move.


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (None, None, {"a.weight", "a.bias", "sub.ab.weight", "sub.ab.bias", "norm.weight", "norm.bias"}),
        ("a", None, {"a.weight", "a.bias"}),
        (r".*\.weight", None, {"a.weight", "sub.ab.weight", "norm.weight"}),
        (["ab"], None, {"sub.ab.weight", "sub.ab.bias"}),
        (["b"], None, None),
        (["ab", "norm.bias"], None, {"sub.ab.weight", "sub.ab.bias", "norm.bias"}),
        (None, ["norm", "bias"], {"a.weight", "sub.ab.weight"}),
        ([r"ab"], ["bias"], {"sub.ab.weight"}),
        (None, ".*", None),
        ("nothing", None, None),
    ],
)
def test_target_and_exclude_patterns(target, exclude, expected: set[str] | None) -> None:
    """A regular expression matches a whole name; an entry of a list is the end of one, at a dot."""
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "sub": nn.ModuleDict({"ab": nn.Linear(8, 8)}), "norm": nn.LayerNorm(8)}
    )
    if expected is None:
        with pytest.raises(ValueError, match=r"zo_target_modules=.* selects no trainable parameter of ModuleDict"):
            LowRank(model, target_modules=target, exclude_modules=exclude)
    else:
        assert set(LowRank(model, target_modules=target, exclude_modules=exclude).coordinates) == expected


def test_frozen_parameters_do_not_move() -> None:
    model = seeded(tiny_opt)
    model.model.requires_grad_(False)
    with pytest.raises(ValueError, match="selects no trainable parameter"):
        LowRank(model)  # the head is tied to the embedding
    model.model.decoder.layers[0].fc1.requires_grad_(True)
    assert {name.rpartition(".")[0] for name in LowRank(model).coordinates} == {"model.decoder.layers.0.fc1"}


def test_tied_weights_have_one_coordinate() -> None:
    space = LowRank(seeded(tiny_opt))
    assert len([name for name in space.coordinates if "embed_tokens" in name or "lm_head" in name]) == 1


def _non_contiguous() -> nn.Module:
    model = nn.Linear(8, 9)
    model.weight = nn.Parameter(torch.randn(8, 9).t())
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_non_contiguous, "not contiguous"),
        (lambda: nn.Linear(8, 8, device="meta"), "meta device"),
    ],
    ids=["non-contiguous", "meta"],
)
def test_what_cannot_be_probed_is_refused_in_one_sentence(build, reason: str) -> None:
    """Naming the parameter and the way out."""
    model = nn.ModuleDict({"good": nn.Linear(8, 8), "bad": build()})
    with pytest.raises(ValueError, match=rf"^bad\.\S+ cannot be perturbed: .*{reason}.*zo_exclude_modules\.$"):
        LowRank(model)
    assert set(LowRank(model, exclude_modules=r"bad\..*|bad").coordinates) == {"good.weight", "good.bias"}


def test_noise_for_a_block_of_coordinates_is_that_of_each_tensor() -> None:
    """The gradient written for the optimizer is Σ cᵢ·zᵢ, tensor by tensor, float32 for half-precision weights."""
    model = seeded(tiny_llama, torch.bfloat16)
    space = LowRank(model, seed=3)
    space.write_gradient([2.0, -0.5], lambda index: Stream(3, 7, index), GAUSSIAN)
    first, second = direction(space, 7, 0), direction(space, 7, 1)
    for name, coordinate in space.coordinates.items():
        assert coordinate.dtype == coordinate.grad.dtype == torch.float32
        expected: Tensor = 2.0 * first[name] - 0.5 * second[name]
        assert torch.allclose(coordinate.grad, expected, rtol=1e-6, atol=1e-6), name


class LooksUpMore(nn.Embedding):
    """Returns its ids, too, as ProphetNet's table of positions does."""

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(ids), ids


def test_a_table_that_returns_more_is_probed_as_a_plain_one() -> None:
    def network(kind: type[nn.Embedding]) -> nn.ModuleDict:
        return nn.ModuleDict({"table": kind(20, 8), "head": nn.Linear(8, 3)})

    ids, found = torch.arange(12).view(4, 3), []
    for kind in (nn.Embedding, LooksUpMore):
        model = seeded(network, torch.float64, kind=kind)
        zo = ZerothOrder(model, "low_rank", seed=0)

        def loss(model: nn.ModuleDict = model) -> torch.Tensor:
            output = model["table"](ids)
            return model["head"](output[0] if isinstance(output, tuple) else output).tanh().mean()

        found.append(zo.estimate(loss).projected_gradients)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
