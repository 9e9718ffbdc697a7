"""Guarantee 9: what moves has been probed, also where a parameter is read outside of its module's forward."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.overrides import _len_torch_function_stack
from transformers import MambaConfig, MambaForCausalLM

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_opt, weights_of
from tests.subspaces.helpers import move_off_the_origin, sgd
from tests.trainer.runs import trained
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable
from zo_hf.subspaces import reads
from zo_hf.subspaces.functional import with_parameters
from zo_hf.trajectory import read_trajectory, replay

EPS = 1e-3
WAYS = ["low_rank", "full", "core", "norms"]


class ReadsDirectly(nn.Module):
    """Multiplies by a child's weight itself; some parameters are read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out, self.unused = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(8, 8)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        assert self.unused.weight.dtype == x.dtype and len(self.unused.weight) == 8  # no reads of values
        return self.out(torch.tanh(F.linear(x, self.layer.weight, self.layer.bias)))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[None], x[None], x[None], need_weights=False)[0]


class Encodes(nn.Module):
    """torch's encoder, which calls a fused kernel in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x[None])


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 5, 2, bidirectional=True), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x[None])[0])


class Normed(nn.Module):
    """The old weight norm, which is a hook, and the new one."""

    def __init__(self) -> None:
        super().__init__()
        self.old, self.new = torch.nn.utils.weight_norm(nn.Linear(8, 6)), parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.new(torch.tanh(self.old(x)))


class Multiplies(torch.autograd.Function):
    """A kernel of one's own, as TRL's and Mamba's are, which get the weight as it was read."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()


class CallsAKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return Multiplies.apply(self.body(x), self.head.weight)


class Unit(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * F.normalize(super().forward(ids), dim=-1)


class Shifted(nn.Embedding):
    """Adds numbers of its own to what it looks up."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + torch.linspace(-1, 1, 6, dtype=torch.float64)


class RunningSum(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).cumsum(-1)


class Positions(nn.Embedding):
    """Returns a view of its weight, as tables of positions do."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[: len(ids)]


class LooksUp(nn.Module):
    """An embedding whose forward does more than look up."""

    kind = nn.Embedding

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = self.kind(32, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        ids = (10 * x.abs().sum(-1)).long() % 32
        return self.out(torch.tanh(self.table(ids)))


LOOKUPS = [
    type(f"LooksUp{kind.__name__}", (LooksUp,), {"kind": kind}) for kind in (Unit, Shifted, RunningSum, Positions)
]


class Patched(nn.Module):
    """Has layers whose forward somebody has replaced, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        layer, out = self.layer, self.out

        def cubed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
            return (x * norm.weight) ** 3 + norm.bias

        layer.forward = lambda x: 3 * torch.relu(F.linear(x, layer.weight, layer.bias))  # type: ignore[method-assign]
        self.norm.forward = types.MethodType(cubed, self.norm)  # type: ignore[method-assign]
        plain = out.forward
        out.forward = functools.wraps(plain)(lambda x: torch.tanh(plain(x)))  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.layer(x)))


class Penalized(nn.Module):
    """Adds a penalty on its weights in its forward, which reads one of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 6), nn.Parameter(torch.linspace(1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.scale + sum(p.abs().sum() for p in self.parameters())


MODELS = [ReadsDirectly, Attends, Encodes, Recurs, Normed, CallsAKernel, *LOOKUPS, Patched, Penalized]


def made(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = kind().to(dtype).eval()
    x = torch.randn(16, 8, dtype=dtype)
    return model, lambda: (model(x).double() ** 2).mean() * 5


def step_taken(
    model: nn.Module, loss: Callable[[], Tensor], subspace: str, seed: int
) -> tuple[float, float, dict[str, Tensor]]:
    """c of a step, the slope of the loss along the direction that the step took, and that direction."""
    start = weights_of(model)
    zo = ZerothOrder(model, subspace, rank=2, seed=seed, eps=EPS, batched_probes=False)
    optimizer = sgd(zo, lr=1.0)
    c = zo.estimate(loss).projected_gradients[0]
    optimizer.step()
    zo.finish()
    step = {name: (tensor - start[name]) / -c for name, tensor in weights_of(model).items()}
    ends = []
    for sign in (1, -1):
        model.load_state_dict({name: start[name] + sign * EPS * step[name] for name in start})
        with torch.no_grad():
            ends.append(loss().item())
    return c, (ends[0] - ends[1]) / (2 * EPS), step


@pytest.mark.parametrize("subspace", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_c_is_the_slope_along_the_step_taken(kind: type[nn.Module], subspace: str) -> None:
    """The step is read from the weights that it wrote."""
    for seed in range(2):
        model, loss = made(kind)
        start = weights_of(model)
        c, slope, step = step_taken(model, loss, subspace, seed)
        assert c != 0.0
        assert c == pytest.approx(slope, rel=1e-8)
        unread = {name for name in start if name.startswith(("unused", "idle"))}
        movable = {name for name in start if name not in unread and (subspace != "norms" or start[name].ndim == 1)}
        assert {name for name, z in step.items() if z.any()} >= movable - {"old.weight_g", "new.weight_g"}
        assert not any(step[name].any() for name in unread)


@pytest.mark.parametrize("subspace", WAYS)
@pytest.mark.parametrize(
    "listed",
    [
        lambda model: [p for p in model.parameters() if p.requires_grad],
        lambda model: [p for name, p in model.named_parameters() if name.startswith("body")],
        lambda model: [nn.utils.parameters_to_vector(model.body.parameters()), model.get_parameter("head.weight")],
        lambda model: [dict(model.named_parameters())["body.bias"].data],
    ],
)
def test_a_penalty_on_listed_parameters_is_a_part_of_the_loss(
    listed: Callable[[nn.Module], list[Tensor]], subspace: str
) -> None:
    """Between steps, the list has the parameters themselves."""
    model, loss = made(CallsAKernel)

    def penalized() -> Tensor:
        return loss() + sum((p**2).sum() for p in listed(model))

    c, slope, _ = step_taken(model, penalized, subspace, seed=0)
    assert c == pytest.approx(slope, rel=1e-8)
    model, loss = made(CallsAKernel)
    assert c != pytest.approx(step_taken(model, loss, subspace, seed=0)[0], rel=1e-2)
    assert all(type(p) is nn.Parameter for p in model.parameters())


class HoldsItsList(CallsAKernel):
    """Penalizes in its forward the weights that it has listed when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.penalized = list(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.stack([p.abs().sum() for p in self.penalized]).sum()


@pytest.mark.parametrize("subspace", WAYS)
def test_a_penalty_on_a_list_from_before_is_a_part_of_the_loss(subspace: str) -> None:
    """As of a list that a Trainer's subclass or a module has made in its `__init__`, in later steps, too."""
    model, loss = made(CallsAKernel)
    held = list(model.parameters())

    def penalized() -> Tensor:
        return loss() + sum((p**2).sum() for p in held) + nn.utils.parameters_to_vector(held).abs().sum()

    c, slope, _ = step_taken(model, penalized, subspace, seed=0)
    assert c == pytest.approx(slope, rel=1e-8)

    def collected() -> Tensor:
        total, copied = torch.zeros_like(held[0]), torch.empty_like(held[0])
        return loss() + (total.add_(held[0]) * copied.copy_(held[0])).sum()

    with torch.no_grad():
        c, slope, _ = step_taken(model, collected, subspace, seed=0)
    assert c == pytest.approx(slope, rel=1e-8)
    assert all(type(p) is nn.Parameter and p is q for p, q in zip(held, model.parameters(), strict=True))
    model, loss = made(HoldsItsList)
    c, slope, _ = step_taken(model, loss, subspace, seed=0)
    assert c == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize("subspace", WAYS)
def test_a_list_from_before_gives_what_a_list_of_now_does_in_later_steps(subspace: str) -> None:
    def numbers_of_steps(lists: Callable[[nn.Module], Callable[[], Any]]) -> list[float]:
        model, loss = made(CallsAKernel)
        zo = ZerothOrder(model, subspace, rank=2, seed=0, eps=EPS, batched_probes=False)
        optimizer, listed, numbers = sgd(zo, lr=1e-3), lists(model), []
        for _ in range(3):
            numbers += zo.estimate(lambda: loss() + sum((p**2).sum() for p in listed())).projected_gradients
            optimizer.step()
        return numbers

    def from_before(model: nn.Module) -> Callable[[], Any]:
        held = list(model.parameters())
        return lambda: held

    assert numbers_of_steps(from_before) == numbers_of_steps(lambda model: model.parameters)


def test_a_list_from_before_is_looked_for_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations cost more while it is."""
    monkeypatch.setattr(reads, "LOOK_EVERY", 3)
    model, loss = made(CallsAKernel)
    zo, modes = ZerothOrder(model, "low_rank", rank=2, batched_probes=False), []

    def noted() -> Tensor:
        modes.append(_len_torch_function_stack())
        return loss()

    optimizer = sgd(zo, 0.0)
    for _ in range(4):
        zo.estimate(noted)
        optimizer.step()
    assert modes == [1, 1, 0, 0, 0, 0, 1, 1]


def test_a_penalty_that_begins_in_the_course_of_a_run_is_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is resumed in between finds it in the same step."""
    monkeypatch.setattr(reads, "LOOK_EVERY", 4)

    def numbers(listed: Callable[[nn.Module], Callable[[], Any]], resumes: bool = False) -> list[float]:
        model, loss = made(CallsAKernel)
        zo = ZerothOrder(model, "low_rank", rank=2, seed=0, eps=EPS, batched_probes=False)
        held, optimizer, found = listed(model), sgd(zo, lr=0.0), []
        for step in range(6):
            if resumes and step in (3, 5):
                zo.subspace.detach()
                state, zo = (
                    zo.state_dict(),
                    ZerothOrder(model, "low_rank", rank=2, seed=0, eps=EPS, batched_probes=False),
                )
                optimizer = sgd(zo, lr=0.0)
                zo.load_state_dict(state)
            penalty = (lambda: sum((p**2).sum() for p in held())) if step >= 2 else lambda: 0.0
            found += zo.estimate(lambda penalty=penalty: loss() + penalty()).projected_gradients
            optimizer.step()
        zo.subspace.detach()
        return found

    def from_before(model: nn.Module) -> Callable[[], Any]:
        held = list(model.parameters())
        return lambda: held

    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        found = numbers(from_before)
    assert [r.message.split(" found that")[0] for r in caplog.records if "list of before" in r.message] == ["step 4"]
    right = numbers(lambda model: model.parameters)
    assert [a == b for a, b in zip(found, right, strict=True)] == [True, True, False, False, True, True]
    assert numbers(from_before, resumes=True) == found


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda p: torch.autograd.grad((p**2).sum(), p)[0].sum(),
        lambda p: torch.func.grad(lambda w: (w**2).sum())(p).sum(),
        lambda p: torch.func.jvp(lambda w: (w**2).sum(), (p,), (torch.ones(p.shape, dtype=p.dtype),))[1],
        lambda p: torch.func.hessian(lambda w: (w**3).sum())(p).sum(),
        lambda p: torch.func.vmap(torch.sin)(p).sum(),
    ],
)
def test_a_derivative_by_a_weight_is_right_or_refused(differentiate: Callable[[Any], Tensor]) -> None:
    """A transform wraps the parameter before any operation sees it, so that it would have the values of the last fold."""

    def c(is_held: bool, is_copied: bool) -> float:
        model, loss = made(CallsAKernel)
        held = list(model.parameters())
        zo = ZerothOrder(model, "low_rank", rank=2, seed=0, batched_probes=False)

        def value() -> Tensor:
            p = held[0] if is_held else next(model.parameters())
            with torch.enable_grad():
                return loss() + differentiate(p.clone().requires_grad_() if is_copied else p).detach()

        return zo.estimate(value).projected_gradients[0]

    right = c(True, True)
    assert c(False, True) == right
    for is_held in (True, False):
        try:
            assert c(is_held, False) == right
        except ValueError as error:
            assert str(error).startswith("the loss gives body.weight to torch.func or torch.autograd")


def test_what_converts_or_copies_a_module_in_a_loss_gets_the_parameters_themselves() -> None:
    """As routers of transformers convert themselves in their forward; otherwise the moved values would be written."""
    model, loss = made(CallsAKernel)
    before, copies = weights_of(model), []
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)

    def converts() -> Tensor:
        model.body.to(torch.float64)
        model.body.to(torch.float32).to(torch.float64)
        copies.append(copy.deepcopy(model.body))
        return loss()

    with torch.no_grad():
        model.load_state_dict({name: tensor.float().double() for name, tensor in before.items()})
    before = weights_of(model)
    zo.estimate(converts)
    assert_same_bits(weights_of(model), before)
    for made_copy in copies:
        assert_same_bits(weights_of(made_copy), weights_of(model.body))


@pytest.mark.parametrize("subspace", ["low_rank", "full", "core"])
@pytest.mark.parametrize(
    "write",
    [
        lambda p, value: p.copy_(value),
        lambda p, value: p.data.copy_(value),
        lambda p, value: p.detach().mul_(value),
        lambda p, value: setattr(p, "data", value),
        lambda p, value: p.__setitem__(0, value[0]),
        lambda p, value: p[0].zero_(),
        lambda p, value: p.__iadd__(value),
        lambda p, value: torch.add(p, value, out=p),
        lambda p, value: torch._foreach_add_([p], [value]),
        lambda p, value: nn.utils.vector_to_parameters(value.flatten(), [p]),
    ],
)
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_loss_that_writes_a_parameter_is_refused(
    write: Callable[[nn.Parameter, Tensor], object], subspace: str, is_listed: bool
) -> None:
    """As one that swaps weights in and back; the values that it has read at the probe would stay in the weights, or be lost."""
    model, loss = made(CallsAKernel)
    held, before = model.body.weight, weights_of(model)
    zo = ZerothOrder(model, subspace, rank=2, batched_probes=False)

    def writes() -> Tensor:
        p = model.get_parameter("body.weight") if is_listed else held
        with torch.no_grad():
            write(p, p.clone())
        return loss()

    with pytest.raises(ValueError, match=r"the loss writes body\.weight, and a probe must leave"):
        zo.estimate(writes)
    assert_same_bits(weights_of(model), before)


def test_a_state_dict_in_a_loss_has_the_parameters_themselves() -> None:
    """Otherwise a loss that loads other weights and its own ones again would leave the moved values in the model."""
    model, loss = made(CallsAKernel)
    before, seen = weights_of(model), []
    zo = ZerothOrder(model, "full", batched_probes=False)

    def loads() -> Tensor:
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.append(saved)
        model.load_state_dict({name: 2 * tensor for name, tensor in saved.items()})
        model.load_state_dict(saved)
        seen.append(pickle.loads(pickle.dumps(dict(zip(names, held, strict=True)))))
        return loss()

    names, held = zip(*model.named_parameters(), strict=True)
    zo.estimate(loads)
    assert_same_bits(weights_of(model), before)
    assert len(seen) == 4
    for copied in seen:
        assert_same_bits(copied, before)


def test_an_evaluation_has_the_present_values_of_a_list_from_before() -> None:
    model, loss = made(HoldsItsList)
    zo = ZerothOrder(model, "low_rank", rank=2, seed=0, batched_probes=False, fold_steps=0)
    optimizer = sgd(zo, 1e-3)
    zo.estimate(loss)
    optimizer.step()
    with torch.no_grad(), zo.subspace.reads.evaluating():
        during = loss().item()
    zo.finish()
    with torch.no_grad():
        assert during == pytest.approx(loss().item(), rel=1e-8)


def test_a_loss_that_switches_parameters_off_and_on_changes_the_parameters_themselves() -> None:
    """As PEFT does to evaluate a model without its adapter; no values are read."""
    model, loss = made(CallsAKernel)
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    seen = []

    def switching() -> Tensor:
        model.body.requires_grad_(False)
        seen.append([p.requires_grad for p in model._modules["body"]._parameters.values()])  # type: ignore[union-attr]
        seen.append([p.requires_grad for p in model.body.parameters()])
        for p in model.body.parameters():
            p.requires_grad = True
        model.zero_grad()
        return loss()

    zo.estimate(switching)
    assert seen == 4 * [[False, False]]
    assert all(p.requires_grad for p in model.parameters())
    assert {name for _, name in zo.subspace.reads.elsewhere} == {"weight"}  # the head's, which the kernel reads


@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_between_folds_sees_the_factors(kind: type[nn.Module]) -> None:
    model, loss = made(kind)
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    zo.estimate(loss)
    zo.subspace.clear_gradient()
    move_off_the_origin(zo.subspace, 0.1)
    with torch.no_grad():
        between = loss().item()
        zo.finish()
        assert loss().item() == pytest.approx(between, rel=1e-9)
        assert loss().item() != pytest.approx(made(kind)[1]().item(), rel=1e-4) or kind is Normed


@pytest.mark.parametrize("subspace", WAYS)
def test_an_exception_leaves_the_model_as_it_was(subspace: str) -> None:
    model, loss = made(ReadsDirectly)
    before, classes = weights_of(model), [type(module) for module in model.modules()]
    zo = ZerothOrder(model, subspace, rank=2, batched_probes=False)
    expected = zo.estimate(loss)

    def interrupted() -> Tensor:
        loss()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zo.estimate(interrupted)
    assert_same_bits(weights_of(model), before)
    with torch.no_grad():
        assert loss().item() == made(ReadsDirectly)[1]().item()
    assert zo.estimate(loss) == expected
    zo.subspace.detach()
    assert [type(module) for module in model.modules()] == classes
    assert not any("_zo_reads" in vars(module) for module in model.modules())


def test_after_the_first_step_only_what_needs_it_is_watched() -> None:
    model, loss = made(ReadsDirectly)
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    zo.estimate(loss)
    watched = {name for name, module in model.named_modules() if "_zo_reads" in vars(module)}
    assert watched == {"", "layer", "unused"}
    plain = seeded(tiny_llama)
    zo = ZerothOrder(plain, "low_rank", batched_probes=False)
    zo.estimate(lambda: plain(**causal_batch()).loss)
    assert not any("_zo_reads" in vars(module) for module in plain.modules())


def test_what_nothing_reads_is_named_with_its_share(caplog: pytest.LogCaptureFixture) -> None:
    model, loss = made(ReadsDirectly)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        ZerothOrder(model, "full", batched_probes=False).estimate(loss)
    message = caplog.messages[-1]
    total = sum(p.numel() for p in model.parameters())
    assert message.startswith(f"3 parameters ({100 * (3 + 72) / total:.1f}% of those that move)")
    assert all(name in message for name in ("idle", "unused.weight", "unused.bias")) and "out." not in message


def test_a_head_that_the_loss_reads_goes_one_probe_at_a_time() -> None:
    """After the model has run, as TRL's losses do; a batch of probes is refused for what reads it."""
    model, batch = seeded(tiny_llama, torch.float64), causal_batch()

    def hidden(inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        states = model.model(**inputs).last_hidden_state
        logits = states[:, :-1] @ model.lm_head.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    zo = ZerothOrder(model, "low_rank")
    estimate = zo.estimate(lambda: hidden(dict(batch)))
    assert zo.evaluator.batched is False
    inside = ZerothOrder(seeded(tiny_llama, torch.float64), "low_rank", batched_probes=False)
    expected = inside.estimate(lambda: inside.model(**batch).loss)
    assert estimate.projected_gradients == pytest.approx(expected.projected_gradients, rel=1e-3)
    probes = zo.estimator.probes()
    at_all = zo.subspace.at(probes, zo._stream, zo.distribution, rows=2)
    with pytest.raises(NotBatchable, match=r"lm_head\.weight is read outside"), at_all, torch.no_grad():
        hidden(dict(batch))


def test_a_tied_head_is_moved_in_both_places() -> None:
    model, batch = seeded(tiny_opt, torch.float64), causal_batch()

    def loss() -> Tensor:
        states = model.model(input_ids=batch["input_ids"]).last_hidden_state
        return (states @ model.lm_head.weight.t()).logsumexp(-1).mean()

    zo = ZerothOrder(model, "full", eps=EPS, batched_probes=False, target_modules=["embed_tokens"])
    c = zo.estimate(loss).projected_gradients[0]
    zo.subspace.detach()
    weight, ends = model.lm_head.weight.data, []
    z = zo.distribution.draw_slice(zo._stream(0), zo.subspace.sites[0].name, 0, weight.view(-1)).view(weight.shape)
    for scale in (1, -2):  # W + εz, and from there W - εz
        weight += scale * EPS * z
        with torch.no_grad():
            ends.append(loss().item())
    assert c == pytest.approx((ends[0] - ends[1]) / (2 * EPS), rel=1e-4)


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_reads_in_half_precision_see_small_perturbations(subspace: str) -> None:
    """Mamba's mixer has parameters of its own beside children; rounding to nearest would lose ε on weights near 1."""
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, bos_token_id=1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model, batch = MambaForCausalLM(config).to(dtype).eval(), causal_batch(8)
        batch = {"input_ids": batch["input_ids"] % 64, "labels": batch["input_ids"] % 64}
        zo = ZerothOrder(model, subspace, num_directions=6, eps=1e-2, batched_probes=False)
        found.append(torch.tensor(zo.estimate(lambda m=model, b=batch: m(**b).loss).projected_gradients))
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.95


def test_copies_and_pickles_of_a_watched_model() -> None:
    model, loss = made(CallsAKernel)
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    zo.estimate(loss)
    move_off_the_origin(zo.subspace, 0.1)
    x = torch.randn(3, 8, dtype=torch.float64)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again.head).__name__ == "Linear" and again.head is not model.head
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
            again.head.weight.zero_()
        assert model._modules["head"]._parameters["weight"].any()


class Routes(nn.Module):
    """One expert of two, chosen by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](x)


def test_a_parameter_moves_from_the_step_on_in_which_it_is_read() -> None:
    torch.manual_seed(0)
    model, x = Routes().double(), torch.randn(4, 8, dtype=torch.float64)
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    optimizer, steps = sgd(zo, lr=0.1), []
    zo.on_step = steps.append
    states = []
    for expert in (0, 0, 1, 0):
        zo.estimate(lambda expert=expert: (model(x, expert) ** 2).mean())
        second = zo.subspace.coordinates["experts.1.weight"].grad
        states.append(second is not None)
        optimizer.step()
    assert states == [False, False, True, True]
    second_expert = ("experts.1.bias", "experts.1.weight")
    assert [step.begins for step in steps] == [(), (), second_expert, ()]
    assert zo.state_dict()["still"] == []


class RoutedTask(nn.Module):
    """The second expert gets its first row in the third step."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.experts = nn.Embedding(128, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: object) -> dict[str, Tensor]:
        RoutedTask.calls += 1
        expert = 1 if RoutedTask.calls in (5, 6, 9, 10) else 0  # two probes a step
        states = self.experts[expert](self.embed(input_ids % 128))
        return {"loss": states.square().mean(), "logits": states}


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_replay_begins_to_move_it_at_the_same_step(tmp_path: Path, subspace: str) -> None:
    RoutedTask.calls = 0
    trainer = trained(tmp_path, RoutedTask(), zo_subspace=subspace, zo_rank=2, max_steps=6, zo_batched_probes=False)
    trajectory = read_trajectory(tmp_path)
    assert trajectory.header["still"] == ["experts.1.bias", "experts.1.weight"]
    assert [record.begins for record in trajectory.records] == [(), (), (0, 1), (), (), ()]
    assert_same_bits(weights_of(replay(RoutedTask(), tmp_path)), weights_of(trainer.model))
    early = weights_of(replay(RoutedTask(), tmp_path, until=2))
    assert torch.equal(early["experts.1.weight"], RoutedTask().experts[1].weight)


def test_a_resumed_run_goes_on_with_what_has_been_read(tmp_path: Path) -> None:
    options = {"zo_rank": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "zo_batched_probes": False}
    RoutedTask.calls = 0
    whole = trained(tmp_path / "whole", RoutedTask(), **options)
    for step in (2, 4):
        RoutedTask.calls = 2 * step
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = trained(tmp_path / f"resumed-{step}", RoutedTask(), resume=str(folder), **options)
        assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
        assert_same_bits(weights_of(replay(RoutedTask(), tmp_path / f"resumed-{step}")), weights_of(whole.model))


def test_the_moved_parameters_of_a_module_are_freed_with_its_forward() -> None:
    """A stand-in that referred to itself would keep all of them until a garbage collection."""
    model = seeded(tiny_opt)
    zo = ZerothOrder(model, "full", eps=1e-3, seed=0)
    zo.subspace.attach()
    layer = model.get_decoder().layers[0].fc1
    gc.disable()
    try:
        stand_in = with_parameters(layer, {"weight": layer.weight + 1})
        assert [name for name, _ in stand_in.named_parameters()] == ["weight", "bias"]
        freed = weakref.ref(stand_in)
        del stand_in
        assert freed() is None
    finally:
        gc.enable()
        zo.subspace.detach()
