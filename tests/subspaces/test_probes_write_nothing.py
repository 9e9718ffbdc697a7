"""Guarantee 1: a probe never writes a weight, however it ends; and afterwards nothing of the engine is left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_gpt2, tiny_llama, tiny_mixtral, weights_of
from tests.subspaces.helpers import EVERY_MODEL, EVERY_SUBSPACE, batch_for, loss_of, prepared, sgd, with_scales
from zo_hf.engine import ZerothOrder

EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bf16", "fp16"]
)
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "tie_word_embeddings": True}


def small_llama(subspace: str, dtype: torch.dtype) -> nn.Module:
    return prepared(subspace, seeded(tiny_llama, dtype, num_attention_heads=2, num_key_value_heads=1, **SMALL))


@EVERY_SUBSPACE
@EVERY_DTYPE
def test_weights_keep_their_bits_over_hundreds_of_probes(subspace: str, dtype: torch.dtype) -> None:
    """One after another and in one batch; in half precision ± ε added and taken away again would drift."""
    model = small_llama(subspace, dtype)
    directions = 25 if subspace == "low_rank" else 5
    zo = ZerothOrder(model, subspace, num_directions=directions, batched_probes=False)
    before, coordinates = weights_of(model), _values(zo)
    loss = loss_of(model, causal_batch(2, 6))
    for step in range(20):
        zo.evaluator.batched = step % 4 > 0
        zo.step = step
        assert zo.estimate(loss).is_finite
    assert zo.evaluator.forward_passes == 20 * 2 * directions
    assert_same_bits(weights_of(model), before)
    assert_same_bits(_values(zo), coordinates)


# How a probe ends has to do with no dtype: every error in float32, and the other dtypes with one.
ERRORS = [(error, torch.float32) for error in (RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt)]
ERRORS += [(RuntimeError, dtype) for dtype in (torch.bfloat16, torch.float16)]


@EVERY_SUBSPACE
@pytest.mark.parametrize(("error", "dtype"), ERRORS)
@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
def test_an_exception_in_the_middle_of_a_probe_leaves_the_model_as_it_was(
    subspace: str, dtype: torch.dtype, error: type[BaseException], batched: bool
) -> None:
    """Raised in the second layer's forward of some later probe; the run then goes on as if nothing had happened."""
    model = small_llama(subspace, dtype)
    zo = ZerothOrder(model, subspace, num_directions=2, batched_probes=batched)
    before, coordinates = weights_of(model), _values(zo)
    batch = causal_batch(2, 6)
    loss = loss_of(model, batch)
    expected = zo.estimate(loss)
    clean = model(**batch).logits

    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if batched or calls == 3:
            raise error("in the middle")

    middle = next(m for name, m in model.named_modules() if name.endswith("mlp.act_fn"))
    handle = middle.register_forward_hook(interrupt)
    with pytest.raises(error, match="in the middle"):
        zo.estimate(loss)
    handle.remove()
    assert_same_bits(weights_of(model), before)
    assert_same_bits(_values(zo), coordinates)
    assert torch.equal(model(**batch).logits, clean)
    assert zo.estimate(loss) == expected


@EVERY_SUBSPACE
@EVERY_MODEL
def test_nothing_is_left_in_the_model_after_finish(subspace: str, build) -> None:
    """No forward, hook, parameter or buffer of the engine's, neither after steps nor without any."""
    for steps in (0, 2):
        model = prepared(subspace, seeded(build))
        batch = batch_for(model)
        model(**batch)  # a classifier writes its problem type into its config in its first forward
        before = _traces(model)
        zo = ZerothOrder(model, subspace, batched_probes=False)
        optimizer = sgd(zo, lr=1e-4)
        for _ in range(steps):
            zo.estimate(lambda model=model, batch=batch: model(**batch).loss)
            optimizer.step()
        zo.finish()
        assert _traces(model) == before
        assert all("forward" not in vars(module) for module in model.modules())


@EVERY_SUBSPACE
def test_a_forward_that_was_there_before_is_called_and_put_back(subspace: str) -> None:
    """accelerate replaces the forward of instances too; its wrapper must go on working."""
    model = with_scales(subspace, seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))))
    norm = model[1]
    calls = []

    def wrapper(x: Tensor) -> Tensor:
        calls.append(len(x))
        return nn.LayerNorm.forward(norm, x)

    norm.forward = wrapper
    zo = ZerothOrder(model, subspace)
    model(torch.ones(3, 8))
    assert calls == [3]
    zo.finish()
    assert vars(norm)["forward"] is wrapper
    assert "forward" not in vars(model[0])


@EVERY_SUBSPACE
def test_state_dict_and_config_are_the_plain_models_while_training(subspace: str) -> None:
    """What others save or read in the middle of a run holds nothing of the engine's."""
    model = prepared(subspace, seeded(tiny_llama))
    keys, config = list(model.state_dict()), copy.deepcopy(model.config.to_dict())
    zo = ZerothOrder(model, subspace)
    zo.estimate(loss_of(model, causal_batch()))
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert not zo.subspace.reads.unread()


@EVERY_SUBSPACE
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mixtral], ids=["gpt2", "mixtral"])
def test_a_probe_computes_without_a_graph(subspace: str, build) -> None:
    """No activation is kept for a backward pass, though the parameters require gradients; inputs are not written."""
    model = prepared(subspace, seeded(build))
    batch = causal_batch()
    given = {key: value.clone() for key, value in batch.items()}
    losses = []

    def closure() -> Tensor:
        losses.append(model(**batch).loss)
        return losses[-1]

    ZerothOrder(model, subspace, batched_probes=False).estimate(closure)
    assert len(losses) == 2 and losses[0] != losses[1]
    assert all(loss.grad_fn is None for loss in losses)
    assert_same_bits(batch, given)


def _values(zo: ZerothOrder) -> dict[str, Tensor]:
    return {name: coordinate.detach().clone() for name, coordinate in zo.subspace.coordinates.items()}


def _traces(model: nn.Module) -> dict[str, object]:
    """Everything by which one could tell that an engine was here, except the weights' values."""
    return {
        "state": [(name, tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for _, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
    }
