"""Every method of PEFT as the adapter subspace: what probes see, what steps write, and that nothing else happens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, weights_of
from tests.subspaces.helpers import direction, float64_throughout, sgd
from tests.subspaces.peft.methods import METHODS, Method, every_method
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.subspaces.peft_methods import adds_to_the_loss, tokens_in_front

# Why probes cannot share a forward pass: the attention caches, PEFT repeats one prompt, adds to the loss,
# or looks at the prompt's device by way of its values.
METHODS_WITHOUT_BATCHES = (
    r"cache of the whole batch; use|: PEFT makes one prompt|: the loss is not the model's own; use|read outside"
)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> object:
    """The model's loss as the Trainer hands it to the engine."""

    def sequential(inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs).loss

    if adds_to_the_loss(model):
        return lambda: sequential(batch)
    return ModelLoss(model, model.get_base_model(), batch, sequential, in_front=tokens_in_front(model))


@every_method()
def test_a_probe_is_the_loss_of_the_weights_it_stands_for(method: Method) -> None:
    """To the bit: another model, in which ξ ± εz is written, has the losses that the probes found."""
    model, written, batch = method.model(moved=0.1), method.model(moved=0.1), method.batch()
    zo = ZerothOrder(model, "adapter", eps=1e-2, num_directions=2, batched_probes=False, seed=5)
    assert zo.subspace.reads.unread()
    losses = zo.probe(lambda: method.exact_loss(model, batch))
    assert not zo.subspace.reads.unread()
    named = dict(written.named_parameters())
    start = weights_of(written)
    for probe, loss in zip(zo.estimator.probes(), losses, strict=True):
        z = direction(zo.subspace, index=probe.direction)
        for name in z:
            named[name].data.copy_(torch.add(start[name], z[name], alpha=probe.scale))
        with torch.no_grad():
            assert loss.item() == method.exact_loss(written, batch).item()
    assert (losses[::2] - losses[1::2]).abs().min() > 1e-6
    zo.subspace.detach()


@every_method(lambda method: method.differentiable and method.float64)
def test_projected_gradient_is_the_directional_derivative(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's, of PEFT's own forward, in float64; and every tensor that moves has a part in it."""
    with float64_throughout(monkeypatch):
        model, batch = method.model(torch.float64, moved=0.1), method.batch()
        zo = ZerothOrder(model, "adapter", eps=1e-6, num_directions=3, batched_probes=False, seed=17)
        estimate = zo.estimate(lambda: method.exact_loss(model, batch))
        zo.subspace.detach()
        zo.subspace.clear_gradient()
        method.exact_loss(model, batch).backward()
    gradient = {n: torch.zeros_like(c) if c.grad is None else c.grad for n, c in zo.subspace.coordinates.items()}
    norm = sum(g.square().sum() for g in gradient.values()) ** 0.5
    assert norm > 1e-5
    for index, found in enumerate(estimate.projected_gradients):
        z = direction(zo.subspace, index=index)
        expected = sum((gradient[name] * z[name]).sum() for name in gradient)
        assert found == pytest.approx(expected.item(), rel=1e-4, abs=1e-4 * norm.item())


@every_method()
def test_a_step_moves_along_the_probed_direction_and_nothing_else_is_written(method: Method) -> None:
    model, batch = method.model(), method.batch()
    before = weights_of(model)
    zo = ZerothOrder(model, "adapter", num_directions=2, seed=5)
    optimizer = sgd(zo, lr=0.5)
    estimate = zo.estimate(own_loss(model, batch))
    assert_same_bits(weights_of(model), before)
    assert estimate.is_finite
    expected = dict(before)
    for index, c in enumerate(estimate.projected_gradients):
        for name, z in direction(zo.subspace, index=index).items():
            expected[name] = expected[name] - 0.5 * c / 2 * z
    optimizer.step()
    zo.finish()
    after = weights_of(model)
    for name in zo.subspace.coordinates:
        assert torch.allclose(after[name], expected[name], rtol=1e-5, atol=1e-6), name
    movable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert movable >= zo.subspace.coordinates.keys()
    frozen = after.keys() - movable
    assert_same_bits({name: after[name] for name in frozen}, {name: before[name] for name in frozen})


@every_method()
def test_an_exception_inside_a_probe_leaves_no_trace(method: Method) -> None:
    model, batch = method.model(), method.batch()
    before, last = weights_of(model), list(model.modules())[-1]
    tables = {module: dict(module.__dict__) for module in model.modules()}
    zo = ZerothOrder(model, "adapter", batched_probes=False)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().lm_head.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        zo.estimate(lambda: method.exact_loss(model, batch))
    handle.remove()
    zo.finish()
    assert_same_bits(weights_of(model), before)
    assert last is list(model.modules())[-1]
    for module, table in tables.items():
        assert module.__dict__.keys() == table.keys()
        assert module._parameters == table["_parameters"]
        assert module._modules == table["_modules"]


@every_method(lambda method: method.batchable)
def test_batched_probes_give_the_losses_of_sequential_ones(method: Method) -> None:
    model = method.model(moved=0.1)
    loss = own_loss(model, method.batch())
    zo = ZerothOrder(model, "adapter", num_directions=3, eps=0.02)
    losses = []
    for batched in (False, True):
        zo.evaluator.batched = batched
        losses.append(zo.probe(loss))
        zo.discard()
    assert torch.allclose(losses[0], losses[1], rtol=0, atol=5e-6)
    assert (losses[0][::2] - losses[0][1::2]).abs().max() > 5e-5


@every_method(lambda method: not method.batchable)
def test_what_cannot_share_a_forward_pass_says_so(method: Method) -> None:
    """And "auto" takes one probe after another."""
    model, batch = method.model(moved=0.1), method.batch()
    with pytest.raises(NotBatchable, match=METHODS_WITHOUT_BATCHES):
        ZerothOrder(model, "adapter", batched_probes=True).estimate(own_loss(model, batch))
    model = method.model(moved=0.1)
    zo = ZerothOrder(model, "adapter")
    assert zo.estimate(own_loss(model, batch)).is_finite
    assert zo.evaluator.batched is False


def test_only_labeled_positions_get_logits_behind_a_prompt() -> None:
    """A prompt shifts the positions: the loss is that of all logits."""
    method = METHODS["prompt tuning"]
    model, batch = method.model(), method.batch()
    loss = own_loss(model, batch)
    assert "logits_to_keep" in loss._inputs
    with torch.no_grad():
        assert loss().item() == pytest.approx(method.exact_loss(model, batch).item(), rel=1e-6)
