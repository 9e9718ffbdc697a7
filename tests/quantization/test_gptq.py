"""Folds into codes with error feedback: GPTQ against a plain loop, what it keeps, and what depends on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.conftest import assert_same_bits, seeded, tiny_bert, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5, weights_of
from tests.quantization.runs import held, resumed_and_replayed, run
from tests.quantized_models import FORMATS, decoded, layer_of, parts_of, quantize, quantized_linear
from tests.subspaces.helpers import move_off_the_origin
from zo_hf import ZerothOrder
from zo_hf.quantization import quantized_layers
from zo_hf.quantization.gptq import ErrorFeedback
from zo_hf.rng import Purpose, Stream
from zo_hf.subspaces import LowRank
from zo_hf.subspaces.code_rounding import round_stochastically

EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS)


def quarters(values: Tensor, column: int) -> Tensor:
    return (values * 4).round() / 4


def plain_gptq(weight: Tensor, inputs: Tensor, nearest: Callable[[Tensor, int], Tensor], damping: float) -> Tensor:
    """GPTQ as its paper derives it, with the inverse of the Hessian of the free columns at every column."""
    w, x = weight.double().clone(), inputs.double()
    hessian = x.t() @ x
    hessian += torch.eye(len(hessian), dtype=torch.float64) * damping * hessian.diagonal().mean()
    free = x.square().sum(0).argsort(descending=True, stable=True).tolist()
    rounded = torch.empty_like(w)
    while free:
        column, inverse = free[0], torch.linalg.inv(hessian[free][:, free])
        rounded[:, column] = nearest(w[:, column].float(), column).double()
        error = (w[:, column] - rounded[:, column]) / inverse[0, 0]
        for place, other in enumerate(free[1:], 1):
            w[:, other] -= error * inverse[0, place]
        free = free[1:]
    return rounded.float()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(2, 90), st.integers(1, 120), st.sampled_from([0.01, 0.1, 1.0]), st.integers(0, 99)
)
def test_rounding_is_that_of_a_plain_loop(m: int, n: int, tokens: int, damping: float, seed: int) -> None:
    """For fewer tokens than columns and for more, of one block of columns and of two."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    inputs = torch.randn(tokens, n, generator=generator) * torch.rand(n, generator=generator)
    found = ErrorFeedback(inputs, damping).round(weight, quarters)
    expected = plain_gptq(weight, inputs, quarters, damping)
    if not torch.equal(found, expected):  # a value halfway between two codes may have gone the other way

        def objective(rounded: Tensor) -> float:
            error, x = (rounded - weight).double(), inputs.double()
            ridge = damping * float(x.square().sum(0).mean())
            return float((error @ x.t()).square().sum() + ridge * error.square().sum())

        assert objective(found) == pytest.approx(objective(expected), rel=0.05)
        assert (found != expected).float().mean() < 0.5


@pytest.mark.parametrize("inputs", [torch.eye(70), torch.zeros(5, 70)])
def test_without_correlations_every_weight_goes_to_its_nearest_code(inputs: Tensor) -> None:
    weight = torch.randn(11, 70)
    assert torch.equal(ErrorFeedback(inputs).round(weight, quarters), quarters(weight, 0))


@EVERY_FORMAT
@pytest.mark.parametrize("tokens", [20, 200])
def test_outputs_change_less_than_with_any_other_rounding(kind: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = layer_of(quantized_linear(torch.randn(48, 96, generator=generator) / 8, None, kind))
    wanted = decoded(layer) + torch.randn(48, 96, generator=generator) / 60
    x = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    x += 0.3 * torch.randn(tokens, 96, generator=generator)

    def error(stored: Tensor) -> float:
        return float(((stored - wanted) @ x.t()).square().sum())

    copies = [{name: part.clone() for name, part in layer.storage().items()} for _ in range(3)]
    layer.make_room(copies[0], 0, 48, wanted)
    rounded = ErrorFeedback(x).round(wanted, layer.nearest(copies[0], 0, 48))
    layer.write(copies[0], 0, 48, rounded, torch.full(wanted.shape, 1 << 15))
    torch.testing.assert_close(layer.dequantize(copies[0], 0, 48), rounded, rtol=1e-5, atol=1e-7)
    layer.requantize(copies[1], 0, 48, wanted, torch.full(wanted.shape, 1 << 15))
    stream = Stream(0, 1, purpose=Purpose.ROUNDING)
    round_stochastically(copies[2], layer, lambda *_: wanted.clone(), "weight", stream)
    gptq, nearest, stochastic = (error(layer.dequantize(copy, 0, 48)) for copy in copies)
    assert gptq < 0.6 * nearest < stochastic


@EVERY_FORMAT
def test_nearest_is_what_writing_to_the_nearest_gives(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(quantized_linear(torch.randn(9, 70, generator=generator), None, kind))
    storage = {name: part.clone() for name, part in layer.storage().items()}
    values = decoded(layer) + 0.03 * torch.randn(9, 70, generator=generator)
    layer.make_room(storage, 0, 9, values)
    nearest = layer.nearest(storage, 0, 9)
    by_column = torch.stack([nearest(values[:, column], column) for column in range(70)], 1)
    layer.write(storage, 0, 9, values, torch.full(values.shape, 1 << 15))
    torch.testing.assert_close(by_column, layer.dequantize(storage, 0, 9), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4"])
def test_a_block_grows_only_if_that_leaves_a_smaller_error(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(quantized_linear(torch.randn(16, 64, generator=generator), None, kind))
    before = layer.storage()["weight.absmax"].clone()
    rows = decoded(layer)
    half = torch.full(rows.shape, 1 << 15)
    layer.requantize(layer.storage(), 0, 16, rows, half)
    largest = rows.abs().argmax(1, keepdim=True)  # one element of each block, whichever others are as large
    longer = rows.scatter(1, largest, 1.02 * rows.gather(1, largest))
    layer.requantize(layer.storage(), 0, 16, longer, half)
    assert torch.equal(layer.storage()["weight.absmax"], before)  # rounding 63 elements anew would cost more
    assert torch.equal(decoded(layer), rows)
    rows[3:8] *= 1.3
    layer.requantize(layer.storage(), 0, 16, rows, half)
    after = layer.storage()["weight.absmax"]
    assert torch.equal(after[8:], before[8:]) and not torch.equal(after[3:8], before[3:8])
    error = (decoded(layer) - rows)[3:8].square().mean().sqrt() / rows[3:8].square().mean().sqrt()
    cut = (rows / 1.3 * 1.3 - rows.clamp(-rows.abs().amax(1, True) / 1.3, rows.abs().amax(1, True) / 1.3))[3:8]
    assert error < 0.15 and error < cut.square().mean().sqrt()


def folded_parts(seed: int, step: int, rounding: str = "gptq", kind: str = "nf4") -> dict[str, Tensor]:
    model = quantize(seeded(tiny_llama, hidden_size=64, intermediate_size=128, num_hidden_layers=1), kind)
    space = LowRank(model, fold_steps=5, seed=seed, fold_rounding=rounding)
    space.attach()
    space.draw_bases(0)
    move_off_the_origin(space)
    space.fold(step, {})
    return parts_of(model)


def test_a_fold_does_not_depend_on_threads_or_what_ran_before() -> None:
    expected = folded_parts(1, 5)
    torch.rand(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same_bits(folded_parts(1, 5), expected)
    finally:
        torch.set_num_threads(threads)
    stochastic = folded_parts(1, 5, "stochastic")
    assert any(not torch.equal(stochastic[name], expected[name]) for name in expected)


@pytest.mark.parametrize("build", [tiny_opt, tiny_bert, tiny_t5, tiny_mixtral])
def test_every_layer_that_reads_tokens_is_rounded_by_its_inputs(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(seeded(build), "int8")
    space = LowRank(model, fold_steps=5, fold_rounding="gptq")
    space.attach()
    move_off_the_origin(space)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    space._round_codes(5, {})
    assert space._new_codes is not None and len(space._new_codes[1]) == len(quantized_layers(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_while_the_model_reads_leaves_every_weight_unwritten() -> None:
    model = quantize(seeded(tiny_llama, hidden_size=64), "int8")
    space = LowRank(model, fold_steps=5, fold_rounding="gptq")
    space.attach()
    move_off_the_origin(space)
    before, coordinates = parts_of(model) | weights_of(model), {n: c.clone() for n, c in space.coordinates.items()}
    hooks = {module: list(module._forward_pre_hooks) for module in model.modules()}

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = model.model.norm.register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        space.fold(5, {})
    handle.remove()
    assert_same_bits(parts_of(model) | weights_of(model), before)
    assert_same_bits(dict(space.coordinates), coordinates)
    assert {module: list(module._forward_pre_hooks) for module in model.modules()} == hooks


def test_layers_without_finite_inputs_are_rounded_stochastically() -> None:
    model = quantize(seeded(tiny_llama, hidden_size=64, num_hidden_layers=1), "int8")
    space = LowRank(model, fold_steps=5, fold_rounding="gptq")
    space.attach()
    move_off_the_origin(space)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = torch.inf
    space._round_codes(5, {})
    assert space._new_codes is not None
    assert {name.split(".")[-2] for name in space._new_codes[1]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    space.fold(5, {})
    assert space.at_origin


def test_a_model_that_reads_no_tokens_is_refused() -> None:
    model = nn.Sequential(quantized_linear(torch.randn(16, 64), None, "int8"))
    with pytest.raises(ValueError, match=r"needs a transformers model .* use zo_fold_rounding='stochastic'"):
        LowRank(model, fold_steps=5, fold_rounding="gptq")


def test_a_model_that_cannot_read_tokens_alone_is_refused_before_training() -> None:
    class Picky(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, pixels: Tensor, **more: Any) -> Any:
            return super().forward(input_ids, **more)

    model = quantize(seeded(lambda: Picky(tiny_llama().config)), "int8")
    with pytest.raises(
        ValueError, match=r"this Picky cannot read tokens alone .*pixels.*; use zo_fold_rounding='stochastic'"
    ):
        LowRank(model, fold_steps=5, fold_rounding="gptq")


@pytest.mark.parametrize(("kind", "fold_steps"), [(None, 5), ("int8", 0)])
def test_gptq_without_codes_to_fold_into_is_refused(kind: str | None, fold_steps: int) -> None:
    model = seeded(tiny_llama)
    model = model if kind is None else quantize(model, kind)
    with pytest.raises(ValueError, match=r"zo_fold_rounding='gptq' rounds folds into .* leave it out"):
        LowRank(model, fold_steps=fold_steps, fold_rounding="gptq")


def test_a_run_resumes_and_replays_to_the_bit(tmp_path: Path) -> None:
    expected = held(resumed_and_replayed(tmp_path, "nf4", zo_fold_rounding="gptq").model)
    stochastic = held(run(tmp_path / "other", "folds", tmp_path / "base", "nf4", max_steps=5).model)
    assert any(not torch.equal(stochastic[name], expected[name]) for name in expected)


def test_a_subspace_without_folds_into_codes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zo_fold_rounding='gptq'.*zo_subspace='norms'"):
        ZerothOrder(quantize(seeded(tiny_llama)), subspace="norms", fold_rounding="gptq")
