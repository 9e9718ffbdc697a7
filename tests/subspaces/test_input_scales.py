"""Directions divided by the size of inputs: the diagonal of K-FAC's input factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, GemmaConfig, GemmaForCausalLM

from tests.conftest import (
    assert_same_bits,
    causal_batch,
    seeded,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_t5,
    weights_of,
)
from tests.quantized_models import quantize
from zo_hf import ZerothOrder
from zo_hf.directions import GAUSSIAN
from zo_hf.rng import Stream
from zo_hf.subspaces import LowRank, Norms
from zo_hf.subspaces.input_scales import Moments

MODELS = [tiny_opt, tiny_llama, tiny_gpt2, tiny_mixtral, tiny_bert, tiny_t5]


def tiny_gemma(**options: Any) -> GemmaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 61}
    return GemmaForCausalLM(GemmaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **options))


def scales_of(space: LowRank, names: list[str]) -> dict[str, Tensor]:
    """The factors of directions over vectors."""
    found = {}
    for name in names:
        block = space.coordinate_blocks.of(name)
        assert block.scale is not None
        found[name] = block.layout.view(block.scale, name)
    return found


def moments(x: Tensor) -> np.ndarray:
    rows = x.detach().double().numpy().reshape(-1, x.shape[-1])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit**2).mean(0) * rows.shape[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 30), st.integers(0, 10**6), st.floats(1, 20))
def test_a_scale_is_that_of_numpy_and_a_probe_moves_outputs_as_far_as_before(
    tokens: int, width: int, seed: int, outlier: float
) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = x[:, 0] * outlier + outlier
    scale, a = Moments(x).scale().double().numpy(), moments(x)
    assert np.allclose(scale, 1 / np.sqrt(np.maximum(a, 1e-2)), rtol=1e-5)
    # E‖(s ⊙ V)ᵀx‖² = Σ s²x², on average over tokens of length √n. Inputs under the bound count for less.
    assert (scale**2 * a).mean() <= 1 + 1e-5
    if a.min() >= 1e-2:
        assert (scale**2 * a).mean() == pytest.approx(1, rel=1e-5)


def test_an_input_that_is_always_zero_has_a_bounded_scale() -> None:
    x = torch.randn(20, 5)
    x[:, 3] = 0
    assert Moments(x).scale()[3] == pytest.approx(10)


@pytest.mark.parametrize("build", [tiny_opt, tiny_llama, tiny_gemma])
def test_norms_are_divided_by_their_normalized_inputs(build: Callable[..., nn.Module]) -> None:
    """The normalized input is what autograd says that the weight multiplies."""
    model = seeded(build).eval()
    factors: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.enable_grad():
                x = args[0].detach()
                rows = x.reshape(-1, x.shape[-1])
                moved = [torch.zeros_like(module.weight, requires_grad=True) for _ in rows]
                bias = {"bias": module.bias} if getattr(module, "bias", None) is not None else {}
                calls = [
                    torch.func.functional_call(module, {"weight": module.weight.detach() + w, **bias}, (row,))
                    for w, row in zip(moved, rows, strict=True)
                ]
                found = torch.autograd.grad(sum(call.sum() for call in calls), moved)
            factors.setdefault(name, torch.stack(found))

        return hook

    name = next(n for n in reversed([n for n, _ in model.named_modules()]) if n.endswith("norm"))
    norm = model.get_submodule(name)

    class Once:
        """Notes the first call, without being called by its own calls."""

        busy = False

        def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
            if not self.busy:
                self.busy = True
                note(name)(module, args, output)

    handle = norm.register_forward_hook(Once())
    space = Norms(model, target_modules=[f"{name}.weight"], preconditioner="inputs")
    handle.remove()
    found = scales_of(space, [f"{name}.weight"])[f"{name}.weight"]
    assert np.allclose(found.numpy(), 1 / np.sqrt(np.maximum(moments(factors[name]), 1e-2)), rtol=1e-4)
    assert found.std() > 0.01


@pytest.mark.parametrize("build", MODELS)
def test_every_linear_layer_and_norm_is_divided_and_nothing_else(build: Callable[..., nn.Module]) -> None:
    model = seeded(build).eval()
    plain, divided = (LowRank(model, preconditioner=kind) for kind in ("none", "inputs"))
    for name in plain.factored:
        before, after = plain.basis(name), divided.basis(name)
        ratio = after / before
        # Every column of V has the same factors.
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-6)
        if not torch.equal(before, after):
            assert ratio.min() > 0 and ratio.max() <= 10.001
    linear = {n for n, s in plain.factored.items() if any(isinstance(m, nn.Linear) for m, _ in s.uses)}
    changed = {n for n in plain.factored if not torch.equal(plain.basis(n), divided.basis(n))}
    assert linear <= changed | {n for n in linear if "expert" in n}
    vectors = [site.name for site in divided.sites if len(site.shape) == 1]
    for name, scale in scales_of(divided, vectors).items():
        assert torch.equal(scale, torch.ones_like(scale)) == name.endswith("bias"), name


def test_a_layer_that_stands_for_several_is_divided_by_the_inputs_of_all() -> None:
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=61, num_hidden_layers=3, **sizes)).eval()
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    spaces = [LowRank(model, preconditioner=kind) for kind in ("inputs", "none")]
    handle.remove()
    ratio = spaces[0].basis(f"{name}.weight") / spaces[1].basis(f"{name}.weight")
    assert len(seen) == 3 and not torch.allclose(seen[0], seen[1])
    expected = 1 / np.sqrt(np.maximum(moments(torch.cat(seen)), 1e-2))
    assert np.allclose(ratio[:, 0].numpy(), expected, rtol=1e-4)


def test_a_step_moves_along_the_direction_that_it_has_probed() -> None:
    model = seeded(tiny_llama, attn_implementation="eager").double().eval()
    zo = ZerothOrder(model, subspace="norms", preconditioner="inputs", estimator="forward_gradient", seed=3)
    batch = causal_batch()
    estimate = zo.estimate(lambda: model(**batch).loss)
    block = next(iter(zo.subspace.coordinate_blocks))
    z = block.noise(Stream(3, 0, 0), GAUSSIAN) * block.scale
    for name, coordinate in block.coordinates.items():
        torch.testing.assert_close(coordinate.grad, estimate.projected_gradients[0] * block.layout.view(z, name))
    zo.finish()
    model.zero_grad()
    model(**batch).loss.backward()
    named = dict(model.named_parameters())
    slope = sum(float((named[name].grad * block.layout.view(z, name)).sum()) for name in block.coordinates)
    assert estimate.projected_gradients[0] == pytest.approx(slope, rel=1e-6)


def test_one_large_input_no_longer_outweighs_all_others() -> None:
    """The share of the largest coordinate in E‖J·z‖² falls from nearly 1 to 1/n."""
    x = torch.randn(200, 16)
    x[:, 5] = 40 + torch.randn(200)
    energy = (x.square() * Moments(x).scale().square()).mean(0)
    assert (x.square().mean(0) / x.square().mean(0).sum())[5] > 0.98
    assert float((energy / energy.sum())[5]) == pytest.approx(1 / 16, rel=0.3)


def test_measuring_writes_nothing_and_leaves_no_trace() -> None:
    model = seeded(tiny_opt, dropout=0.5).train()
    before, state = weights_of(model), torch.get_rng_state()
    zo = ZerothOrder(model, preconditioner="inputs")
    assert torch.equal(torch.get_rng_state(), state) and model.training
    zo.estimate(lambda: model(**causal_batch()).loss)
    zo.subspace.detach()
    assert_same_bits(weights_of(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scales_depend_on_neither_the_coordinates_nor_the_order_of_draws() -> None:
    space = LowRank(seeded(tiny_llama), seed=3, preconditioner="inputs")
    space.attach()
    vectors = [site.name for site in space.sites if len(site.shape) == 1]
    bases = {name: space.basis(name).clone() for name in space.factored}
    scales = {name: scale.clone() for name, scale in scales_of(space, vectors).items()}
    with torch.no_grad():
        for coordinate in space.coordinates.values():
            coordinate.normal_()
    space.coordinates_changed()
    space.draw_bases(50)
    assert not torch.equal(space.basis("lm_head.weight"), bases["lm_head.weight"])
    space.draw_bases(0)
    assert_same_bits({name: space.basis(name) for name in space.factored}, bases)
    assert_same_bits(scales_of(space, vectors), scales)


def test_half_precision_and_quantized_layers_are_divided_too() -> None:
    space = LowRank(seeded(tiny_llama, dtype=torch.bfloat16), preconditioner="inputs")
    assert {space.basis(name).dtype for name in space.factored} == {torch.bfloat16}
    model = quantize(seeded(tiny_llama, hidden_size=64, intermediate_size=128), "int8")
    plain, divided = (LowRank(model, preconditioner=kind) for kind in ("none", "inputs"))
    layers = [site.name for site in plain.sites if site.layer is not None]
    assert layers and all(not torch.equal(plain.basis(name), divided.basis(name)) for name in layers)


def test_a_model_without_tokens_is_refused() -> None:
    message = r"zo_preconditioner='inputs' needs a transformers model .* use zo_preconditioner='none'\.$"
    with pytest.raises(ValueError, match=message):
        ZerothOrder(nn.Linear(30, 30), preconditioner="inputs")


def test_a_lack_of_memory_is_not_taken_for_a_model_that_cannot_read_tokens() -> None:
    model = seeded(tiny_llama)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        ZerothOrder(model, preconditioner="inputs")
    assert len(model.lm_head._forward_pre_hooks) == 1
