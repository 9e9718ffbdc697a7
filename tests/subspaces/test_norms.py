"""Only parameters of one dimension move."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import CAUSAL_MODELS, assert_same_bits, seeded, tiny_llama, tiny_opt, weights_of
from tests.quantized_models import FORMATS, parts_of, quantize
from tests.subspaces.helpers import batch_for, sgd
from zo_hf.engine import ZerothOrder
from zo_hf.quantization import stored_tensors
from zo_hf.subspaces import Norms


def steps(model: torch.nn.Module, count: int = 3, lr: float = 1e-2) -> None:
    zo = ZerothOrder(model, "norms", batched_probes=False)
    optimizer = sgd(zo, lr)
    for step in range(count):
        zo.estimate(lambda step=step: model(**batch_for(model, seed=step)).loss)
        optimizer.step()
    zo.finish()


@pytest.mark.parametrize("build", CAUSAL_MODELS.values(), ids=CAUSAL_MODELS)
def test_every_norm_and_bias_moves_and_nothing_else(build) -> None:
    model = seeded(build)
    before = weights_of(model)
    steps(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.ndim >= 2), name


@pytest.mark.parametrize("kind", FORMATS)
def test_in_a_quantized_model_too(kind: str) -> None:
    """An OPT's layers have biases, which no format quantizes; codes and scales stay as they are."""
    model = quantize(seeded(tiny_opt, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64), kind)
    before = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}
    codes = parts_of(model)
    steps(model)
    moved = {name for name, tensor in stored_tensors(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith(("bias", "norm.weight"))}
    assert_same_bits(parts_of(model), codes)


def test_targets_select_among_them() -> None:
    space = Norms(seeded(tiny_opt), target_modules=["q_proj", "fc1"])
    assert {name.split(".", 4)[-1] for name in space.coordinates} == {"self_attn.q_proj.bias", "fc1.bias"}
    assert space.dimension == 2 * (32 + 64)


def test_a_model_without_any_is_refused_in_one_sentence() -> None:
    message = (
        r"^zo_subspace='norms' finds no trainable parameter of one dimension in \w+; use zo_subspace='low_rank'\.$"
    )
    with pytest.raises(ValueError, match=message):
        Norms(seeded(tiny_llama), exclude_modules=r".*norm.*")
