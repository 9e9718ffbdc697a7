"""One layer of each format: decoded as its library does, multiplied exactly, written anew without bias."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.quantized_models import FORMATS, decoded, layer_of, quantized_linear
from zo_hf.quantization import QuantizedLayer
from zo_hf.quantization.bitsandbytes_4bit import round_to_level

EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS)
EIGHT_BITS = [kind for kind in FORMATS if "4" not in kind]
SHAPES = [(48, 64), (33, 70), (5, 129), (70, 600), (3, 2)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int = 0, size: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def made(kind: str, shape: tuple[int, int] = (33, 70), seed: int = 0, bias: bool = False) -> QuantizedLayer:
    return layer_of(quantized_linear(normal(*shape, seed=seed), normal(shape[0], seed=1) if bias else None, kind))


def uniform(shape: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << 16, shape, generator=generator, dtype=torch.int32)


def copied(layer: QuantizedLayer) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in layer.storage().items()}


def written(layer: QuantizedLayer, weight: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight after it was requantized into a copy of the layer's parts, and these parts."""
    storage, random = copied(layer), uniform(weight.shape, seed)
    for start, stop in layer.tiles():
        layer.requantize(storage, start, stop, weight[start:stop].clone(), random[start:stop])
    return layer.dequantize(storage, 0, layer.shape[0]), storage


def by_its_library(module: nn.Module, kind: str) -> Tensor:
    """The weight as bitsandbytes or torchao decodes it, float32."""
    weight: Any = module.weight
    if kind == "torchao":
        return weight.dequantize().float()
    if kind == "int8":
        return bitsandbytes.functional.int8_vectorwise_dequant(module.state.CB, module.state.SCB).float()
    with torch.compiler.set_stance(
        "force_eager"
    ):  # for some shapes it would compile, for minutes where cores are busy
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


# Reading.


@EVERY_FORMAT
@EVERY_SHAPE
def test_a_weight_is_decoded_as_by_its_own_library(kind: str, shape: tuple[int, int]) -> None:
    layer = made(kind, shape)
    torch.testing.assert_close(decoded(layer), by_its_library(layer.module, kind), rtol=1e-6, atol=1e-8)
    original = normal(*shape)
    assert (decoded(layer) - original).norm() < 0.2 * original.norm()


@EVERY_FORMAT
@EVERY_SHAPE
def test_tiles_are_parts_of_the_whole(kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(kind, shape)
    whole = decoded(layer)
    for module in ("layer", "bitsandbytes_4bit"):
        monkeypatch.setattr(f"zo_hf.quantization.{module}.TILE", 130)
    tiles = list(layer.tiles())
    assert tiles[0][0] == 0 and tiles[-1][1] == shape[0]
    assert all(before[1] == after[0] for before, after in pairwise(tiles))
    assert torch.equal(torch.cat([layer.dequantize(layer.storage(), *tile) for tile in tiles]), whole)
    change = normal(*shape, seed=3, size=0.01)
    in_tiles, _ = written(layer, whole + change)
    monkeypatch.undo()
    assert torch.equal(in_tiles, written(layer, whole + change)[0])


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_exact_product_is_that_of_the_decoded_weight(kind: str, dtype: torch.dtype) -> None:
    """For inputs with outliers too, which LLM.int8() takes out of its integer product."""
    layer = made(kind, (33, 128), bias=True)
    x = normal(4, 3, 128, seed=2, size=1.0)
    x[..., 5] *= 50
    expected = x.to(dtype).float() @ decoded(layer).t()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (layer.linear(x.to(dtype)).float() - expected).abs().max() < tolerance * expected.abs().max()
    assert layer.linear(x.to(dtype)).dtype == layer.forward(x.to(dtype)).dtype == dtype
    with_bias = layer.forward(x.to(dtype)).float()
    assert (with_bias - expected - layer.bias.float()).abs().max() < 2 * tolerance * expected.abs().max()


def test_only_int8_of_bitsandbytes_rounds_its_input() -> None:
    x = normal(7, 128, seed=2, size=1.0)
    for kind in FORMATS:
        layer = made(kind, (33, 128))
        apart = (layer.module(x) - layer.linear(x)).abs().max() / layer.linear(x).abs().max()
        assert layer.rounds_activations == (kind == "int8")
        assert (apart > 1e-3) == layer.rounds_activations, kind


# Writing.


@EVERY_FORMAT
@EVERY_SHAPE
def test_what_is_on_the_grid_stays_bit_for_bit(kind: str, shape: tuple[int, int]) -> None:
    layer = made(kind, shape)
    before = copied(layer)
    for seed in range(20):
        result, storage = written(layer, decoded(layer), seed)
        assert torch.equal(result, decoded(layer))
        # fp4 has two zeros; of an odd number of 4-bit codes, half a byte is no code.
        if kind in EIGHT_BITS or (kind != "fp4" and result.numel() % 2 == 0):
            assert all(torch.equal(storage[name], before[name]) for name in before)


@EVERY_FORMAT
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 20), columns=st.integers(2, 150), seed=st.integers(0, 1000), size=st.sampled_from([1e-4, 5e-3])
)
def test_a_written_weight_is_one_of_the_two_neighbors(
    kind: str, rows: int, columns: int, seed: int, size: float
) -> None:
    """And within the code's range: 4-bit blocks and int8 rows may grow."""
    layer = made(kind, (rows, columns), seed)
    wanted = decoded(layer) + normal(rows, columns, seed=seed + 1, size=size)
    result, storage = written(layer, wanted, seed)
    if kind in EIGHT_BITS:
        codes, units = layer.codes(storage), layer.units(storage)  # type: ignore[attr-defined]
        assert codes.abs().max() <= 127 or kind == "torchao"  # which has -128 too
        assert ((result - wanted).abs() <= units[:, None] * (1 + 1e-3)).all()
        fits = wanted.abs().amax(1) <= layer.units(layer.storage()) * 127  # type: ignore[attr-defined]
        assert torch.equal(units[fits], layer.units(layer.storage())[fits])  # type: ignore[attr-defined]
    else:
        scales = layer._scales(storage, 0, rows * columns)  # type: ignore[attr-defined]
        blocks = scales.repeat_interleave(64)[: rows * columns].view(rows, columns)
        levels = layer.module.weight.quant_state.code.sort().values
        assert (scales >= layer._scales(layer.storage(), 0, rows * columns)).all()  # type: ignore[attr-defined]
        clamped = wanted.clamp(levels[0] * blocks, levels[-1] * blocks)
        assert ((result - clamped).abs() <= levels.diff().max() * blocks * (1 + 1e-4)).all()


def neighbors(layer: QuantizedLayer, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The values that the format has just below and just above, with the scales that the layer has."""
    if layer.format.startswith("int8"):
        units = layer.units(layer.storage())[:, None]  # type: ignore[attr-defined]
        low = (wanted / units).floor()
        return low * units, (low + 1) * units
    scales = layer._scales(layer.storage(), 0, wanted.numel())  # type: ignore[attr-defined]
    blocks = scales.repeat_interleave(64)[: wanted.numel()].view(wanted.shape)
    levels = layer.module.weight.quant_state.code.unique()
    below = torch.searchsorted(levels, wanted / blocks, right=True) - 1
    return levels[below] * blocks, levels[below + 1] * blocks


@EVERY_FORMAT
def test_writing_is_unbiased(kind: str) -> None:
    """The mean over seeds is what was to be written, though a single update is a hundredth of a code's step."""
    layer = made(kind, (16, 70))
    before = decoded(layer)
    wanted = before * 0.98 + normal(16, 70, seed=5, size=2e-4)  # nothing leaves the range
    count = 800
    results = torch.stack([written(layer, wanted, seed)[0] for seed in range(count)]).double()
    low, high = neighbors(layer, wanted)
    assert ((results == low) | (results == high)).all()
    # Of an element with few jumps the law is a wide one.
    share = ((wanted - low) / (high - low)).clamp(0.005, 0.995)
    student = (results.mean(0) - wanted) / ((high - low) * (share * (1 - share) / count).sqrt())
    assert student.abs().max() < 6
    assert abs(student.mean()) < 5 / wanted.numel() ** 0.5
    # Rounded to nearest, most of the update would be lost.
    nearest = torch.where((wanted - low).abs() < (high - wanted).abs(), low, high)
    lost = ((nearest - wanted) * (wanted - before)).sum() / (wanted - before).square().sum()
    kept = ((results.mean(0) - before) * (wanted - before)).sum() / (wanted - before).square().sum()
    assert abs(lost) > 5 * abs(kept - 1)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_row_that_outgrows_its_scale_gets_a_larger_one_with_room(kind: str) -> None:
    layer = made(kind)
    wanted = decoded(layer).clone()
    wanted[3, 7] = 3 * wanted[3].abs().max()
    result, storage = written(layer, wanted)
    assert result[3, 7] == pytest.approx(wanted[3, 7].item(), rel=0.01)
    units, old = layer.units(storage), layer.units(layer.storage())  # type: ignore[attr-defined]
    assert units[3] == pytest.approx(wanted[3, 7].item() / 127 * (1 + 1 / 32), rel=0.01)
    others = torch.arange(len(units)) != 3
    assert torch.equal(units[others], old[others]) and torch.equal(result[others], wanted[others])
    layer.requantize(storage, 0, 33, result.clone(), uniform(result.shape, 9))
    assert torch.equal(layer.dequantize(storage, 0, 33), result)
    assert torch.equal(layer.units(storage), units)  # type: ignore[attr-defined]


@EVERY_FORMAT
def test_zeros_stay_zero(kind: str) -> None:
    layer = layer_of(quantized_linear(torch.zeros(4, 64), None, kind))
    assert not decoded(layer).any()
    assert not written(layer, torch.zeros(4, 64))[0].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=40), st.integers(0, 99))
def test_a_rounded_value_is_a_level_beside_it(values: list[float], seed: int) -> None:
    levels = torch.tensor([0.3, -1.0, 0.0, 1.0, -0.2, 0.7])
    given_values = torch.tensor(values, dtype=torch.float32)
    ordered = levels.sort().values
    result = levels[round_to_level(given_values, levels, uniform((len(values),), seed))]
    for value, level in zip(given_values.clamp(-1, 1), result, strict=True):
        below, above = ordered[ordered <= value + 1e-5].max(), ordered[ordered >= value - 1e-5].min()
        assert level in (below, above)


# Scales.


@EVERY_FORMAT
def test_scales_are_multiplied(kind: str) -> None:
    """Exactly where they are numbers; rounded stochastically, without bias, where they are codes themselves."""
    layer = made(kind, (64, 256))
    log_scales = normal(*layer.scale_shape, seed=3, size=0.05)
    before = decoded(layer)
    means = []
    for seed in range(60 if kind == "nf4 nested" else 1):
        storage = copied(layer)
        error, total = layer.scale(storage, log_scales, uniform(layer.scale_shape, seed))
        means.append(layer.dequantize(storage, 0, 64))
        assert (kind == "nf4 nested") == (error > 1e-8 * total)
    blocks = 256 if kind in EIGHT_BITS else 64
    expected = (before.view(-1, blocks) * log_scales.view(-1, 1).exp()).view(64, 256)
    mean = torch.stack(means).mean(0)
    if kind != "nf4 nested":
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)
    else:
        nearly = (mean - expected).norm() / expected.norm()
        assert nearly < 0.3 * ((means[0] - expected).norm() / expected.norm())


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_probe_of_the_scales_is_what_scaled_weights_give(kind: str, dtype: torch.dtype, exact: bool) -> None:
    """For groups of rows with scales of their own, of a layer with a bias, which stays."""
    layer = made(kind, (64, 128), bias=True)
    log_scales = torch.stack([normal(*layer.scale_shape, seed=seed, size=0.2) for seed in (3, 4)])
    x = normal(2, 5, 128, seed=6, size=1.0).to(dtype)
    got = layer.scaled_forward(layer.forward, x, log_scales, exact=exact).float()
    blocks = 128 if kind in EIGHT_BITS else 64
    for part, inputs, own in zip(got, x.float(), log_scales, strict=True):
        weight = (decoded(layer).view(-1, blocks) * own.view(-1, 1).exp()).view(64, 128)
        expected = inputs @ weight.t() + layer.bias.float()
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert (part - expected).abs().max() < tolerance * expected.abs().max()


@EVERY_FORMAT
def test_a_small_step_of_the_scales_is_seen_in_half_precision(kind: str) -> None:
    """exp(1e-3) is 1 in bfloat16; a probe of that size must move the mean output by about that share."""
    layer = made(kind, (64, 128))
    x = normal(1, 400, 128, seed=6, size=1.0).bfloat16()
    both = [
        layer.scaled_forward(layer.forward, x, torch.full((1, *layer.scale_shape), sign * 1e-3), exact=True).double()
        for sign in (1, -1)
    ]
    plain = layer.forward(x).double()
    seen = ((both[0] - both[1]) * plain).sum() / (2e-3 * plain.square().sum())
    assert seen == pytest.approx(1.0, abs=0.25)


# What bitsandbytes does to 4-bit weights on some CPUs.


def packed(layer: QuantizedLayer) -> nn.Module:
    module: Any = layer.module
    module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        module(torch.ones(1, layer.shape[1]))
    assert module.weight.quant_state.packing_format_for_cpu
    return module


# Only CPUs with AVX512-BF16 pack, and elsewhere there is nothing to undo.
PACKED = ["nf4", "nf4 nested", "fp4"] if bitsandbytes.functional.has_avx512bf16() else []


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("shape", [(64, 64), (96, 192)], ids=str)
def test_packed_weights_are_unpacked(kind: str, shape: tuple[int, int]) -> None:
    """Codes come back as they were, scales as far as bfloat16 has kept them."""
    layer = made(kind, shape)
    before, codes = decoded(layer), layer.storage()["weight"].clone()
    again = layer_of(packed(layer))
    assert torch.equal(again.storage()["weight"].view(-1), codes.view(-1))
    torch.testing.assert_close(decoded(again), before, rtol=2**-7, atol=1e-6)
    after = decoded(again)
    again.module(torch.ones(1, shape[1]))  # is not packed again
    assert torch.equal(decoded(again), after)


def test_a_bias_has_the_dtype_of_the_product_from_the_start() -> None:
    """bitsandbytes would cast it in its first forward, which could be a probe's."""
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(64, 8, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    layer = layer_of(module)
    assert layer.bias is module.bias and module.bias.dtype == torch.bfloat16
    before = module.bias.detach().clone()
    module(torch.ones(2, 64))
    assert torch.equal(module.bias, before)


def test_bitsandbytes_says_only_once_that_it_casts_its_inputs(caplog: pytest.LogCaptureFixture) -> None:
    module = made("int8").module
    for _ in range(3):
        module(normal(2, 70))
    # None where an earlier test of this process has heard it.
    assert sum("inputs will be cast from" in record.getMessage() for record in caplog.records) <= 1
