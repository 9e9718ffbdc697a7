"""V made of the inputs of linear layers (AGZO)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import (
    assert_same_bits,
    causal_batch,
    seeded,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_t5,
    translation_batch,
    weights_of,
)
from tests.quantization.runs import resumed_and_replayed, run
from tests.trainer.runs import config, logged
from zo_hf import ZerothOrder
from zo_hf.subspaces import LowRank
from zo_hf.subspaces.activation_basis import basis_of

MODELS = [tiny_opt, tiny_llama, tiny_gpt2, tiny_mixtral, tiny_bert, tiny_t5, tiny_bart]


def space_of(model: nn.Module, **options: object) -> LowRank:
    return LowRank(model, basis="activation", **options)  # type: ignore[arg-type]


def energy(x: Tensor, basis: Tensor) -> float:
    """Share of the inputs' energy that lies in the span of a basis."""
    q, _ = torch.linalg.qr(basis.double())
    return float((x.double() @ q).square().sum() / x.double().square().sum())


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        return translation_batch()
    batch = causal_batch()
    return batch | {"labels": torch.tensor([0, 1, 1, 0])} if "Classification" in type(model).__name__ else batch


def test_a_basis_is_that_of_numpy_and_moves_outputs_as_far_as_a_dense_direction() -> None:
    x, noise = torch.randn(50, 20), torch.randn(50, 3)
    found = basis_of(x, 3, noise).double().numpy()
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    q, _ = np.linalg.qr(unit.T @ noise.double().numpy())
    expected = q / np.sqrt(np.mean(np.sum((unit @ q) ** 2, axis=1)))
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)
    # E‖U (V/√r)ᵀ x‖² = m ‖(V/√r)ᵀ x‖², and m ‖x‖² for a dense direction of unit variance
    assert np.mean(np.sum((unit @ found) ** 2, axis=1)) == pytest.approx(1, abs=1e-5)


def test_inputs_of_low_rank_lie_in_the_basis() -> None:
    x = torch.randn(40, 2) @ torch.randn(2, 30)
    assert energy(x, basis_of(x, 2, torch.randn(40, 2))) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("build", MODELS)
def test_the_gradient_lies_more_in_the_basis_than_in_a_random_one(build: Callable[[], nn.Module]) -> None:
    model = seeded(build).eval()
    spaces = {kind: LowRank(model, basis=kind) for kind in ("random", "activation")}
    for space in spaces.values():
        space.detach()
    model(**batch_of(model)).loss.backward()
    share = dict.fromkeys(spaces, 0.0)
    linear = [name for name in spaces["random"].factored if not torch.equal(*(s.basis(name) for s in spaces.values()))]
    assert len(linear) >= 8
    for kind, space in spaces.items():
        for name in linear:
            site = space.factored[name]
            if site.parameter.grad is not None:
                share[kind] += energy(site.as_matrix(site.parameter.grad), space.basis(name))
    assert share["activation"] > 1.3 * share["random"]


def test_measuring_leaves_no_trace() -> None:
    model = seeded(tiny_opt, dropout=0.5).train()
    before, state = weights_of(model), torch.get_rng_state()
    model.model.decoder.layers[0].eval()
    space_of(model).detach()
    assert_same_bits(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.model.decoder.layers[0].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_basis_does_not_depend_on_the_coordinates() -> None:
    space = space_of(seeded(tiny_llama), seed=3)
    space.attach()
    first = {name: space.basis(name).clone() for name in space.factored}
    with torch.no_grad():
        for coordinate in space.coordinates.values():
            coordinate.normal_()
    space.coordinates_changed()
    space.draw_bases(0)
    assert_same_bits({name: space.basis(name) for name in space.factored}, first)
    assert not space.at_origin
    space.draw_bases(50)
    assert not torch.equal(space.basis("lm_head.weight"), first["lm_head.weight"])


def test_half_precision_rounds_the_basis_to_the_weights_dtype() -> None:
    space = space_of(seeded(tiny_opt, dtype=torch.bfloat16))
    assert {space.basis(name).dtype for name in space.factored} == {torch.bfloat16}


def test_a_quantized_run_resumes_and_replays_to_the_bit(tmp_path: Path) -> None:
    activation = resumed_and_replayed(tmp_path, "int8", zo_basis="activation")
    random = run(tmp_path / "random", "folds", tmp_path / "base", "int8", max_steps=5)
    assert logged(activation, "zo/projected_grad") != logged(random, "zo/projected_grad")


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zo_basis='activation' needs a transformers model .* use zo_basis='random'"):
        ZerothOrder(nn.Linear(30, 30), basis="activation")


def test_a_model_that_cannot_read_tokens_alone_is_refused() -> None:
    class Picky(type(seeded(tiny_opt))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
            return super().forward(input_ids)

    with pytest.raises(ValueError, match=r"this Picky cannot read tokens alone .*pixels.*; use zo_basis='random'"):
        ZerothOrder(Picky(tiny_opt().config), basis="activation")


def test_an_unknown_basis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"zo_basis='pca' must be one of random, activation"):
        config(tmp_path, zo_basis="pca")
