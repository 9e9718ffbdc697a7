"""Probes of a quantized model: they write nothing, they are exact, and they decode no more often than they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_opt
from tests.quantized_models import FORMATS, count_calls, dequantized, parts_of, quantize
from tests.subspaces.helpers import direction
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.quantization import QuantizedLayer, quantized_layers, stored_tensors
from zo_hf.quantization.rowwise import RowwiseInt8
from zo_hf.subspaces import SUBSPACES

EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS)
SETUPS: dict[str, dict[str, Any]] = {
    "factors": {"subspace": "low_rank", "fold_steps": 0},
    "folds": {"subspace": "low_rank", "fold_steps": 3},
    "core": {"subspace": "core", "fold_steps": 3, "rank": 8},
    "scales": {"subspace": "scales"},
    "norms": {"subspace": "norms"},
}
EVERY_WAY = pytest.mark.parametrize("way", SETUPS)


def model_of(kind: str, build=tiny_llama, dtype: torch.dtype = torch.float32) -> nn.Module:
    wide = {"word_embed_proj_dim": 64, "ffn_dim": 128} if build is tiny_opt else {"intermediate_size": 128}
    return quantize(seeded(build, dtype, hidden_size=64, **wide), kind)


def engine(model: nn.Module, way: str, **kwargs: Any) -> ZerothOrder:
    options = dict(SETUPS[way])
    return ZerothOrder(model, SUBSPACES[options.pop("subspace")](model, **options), **kwargs)


def loss_of(model: nn.Module, rows: int = 4) -> ModelLoss:
    return ModelLoss(model, model, causal_batch(rows), lambda inputs: model(**inputs).loss)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@EVERY_FORMAT
@pytest.mark.parametrize(
    ("way", "build"), [*((way, tiny_llama) for way in SETUPS), ("folds", tiny_opt), ("norms", tiny_opt)]
)
def test_probes_and_exceptions_write_nothing(kind: str, way: str, build) -> None:
    """Neither codes nor scales nor biases, whose dtype the layers of bitsandbytes change in their forward."""
    model = model_of(kind, build)
    zo = engine(model, way, num_directions=2)
    before = copies(stored_tensors(model))
    for batched in (False, True):
        zo.evaluator.batched = batched
        assert zo.estimate(loss_of(model)).is_finite
    last = next(module for name, module in model.named_modules() if name.endswith(("down_proj", "fc2")))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        zo.estimate(loss_of(model))
    handle.remove()
    assert_same_bits(copies(stored_tensors(model)), before)


@EVERY_FORMAT
@EVERY_WAY
def test_probes_see_the_model_that_the_codes_stand_for(kind: str, way: str) -> None:
    """c is that of an unquantized model with the decoded weights, where bitsandbytes' own 8-bit product loses it."""
    model = model_of(kind)
    plain = dequantized(model)
    zo = engine(model, way, eps=1e-4, num_directions=4, batched_probes=False)
    found = torch.tensor(zo.estimate(loss_of(model)).projected_gradients)
    if way == "scales":  # which the plain model does not have: exp(ξ) written out
        expected = torch.tensor(scaled_by_hand(zo, plain))
    else:
        names = list(zo.subspace.coordinates)
        options = {name: value for name, value in SETUPS[way].items() if name != "subspace"}
        twin = SUBSPACES[SETUPS[way]["subspace"]](plain, target_modules=names, **options)
        assert twin.coordinates.keys() == zo.subspace.coordinates.keys()
        reference = ZerothOrder(plain, twin, eps=1e-4, num_directions=4, batched_probes=False)
        expected = torch.tensor(reference.estimate(loss_of(plain)).projected_gradients)
    # The losses' last bits, divided by 2ε, are some 1e-3 to 1e-2.
    assert (found - expected).abs().max() < 0.02 + 0.02 * expected.abs().max()


def scaled_by_hand(zo: ZerothOrder, plain: nn.Module) -> list[float]:
    """c of every direction, from the plain weights times exp(±ε·z)."""
    weights = {site.name: plain.get_submodule(site.name.removesuffix(".weight")).weight for site in zo.subspace.sites}
    clean, eps = copies(weights), zo.estimator.eps
    found = []
    for index in range(4):
        z = direction(zo.subspace, index=index)
        losses = []
        for sign in (1, -1):
            for name, weight in weights.items():
                factors = (sign * eps * z[name]).exp().view(-1, 1)
                weight.data = (clean[name].view(len(factors), -1) * factors).view(weight.shape)
            with torch.no_grad():
                losses.append(loss_of(plain)().double().item())
        found.append((losses[0] - losses[1]) / (2 * eps))
    return found


def test_bitsandbytes_own_8_bit_forward_would_lose_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why probes take the exact product: with activations rounded to integers c is mostly that rounding."""
    apart = {}
    for way in ("exact", "rounded"):
        model = model_of("int8")
        plain = dequantized(model)
        zo = engine(model, "factors", eps=1e-4, num_directions=8, batched_probes=False)
        if way == "rounded":
            for layer in zo.subspace.quantized.values():
                layer.rounds_activations = False
        found = torch.tensor(zo.estimate(loss_of(model)).projected_gradients)
        twin = SUBSPACES["low_rank"](plain, target_modules=list(zo.subspace.coordinates), fold_steps=0)
        reference = ZerothOrder(plain, twin, eps=1e-4, num_directions=8, batched_probes=False)
        expected = torch.tensor(reference.estimate(loss_of(plain)).projected_gradients)
        apart[way] = float((found - expected).norm() / expected.norm())
    assert apart["exact"] < 0.05 and apart["rounded"] > 10 * apart["exact"]


@pytest.mark.parametrize("way", ["factors", "folds", "norms", "scales"])
def test_batched_probes_decode_every_8_bit_layer_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many probes share a step; one after another they decode it each."""
    model = model_of("int8")
    zo = engine(model, way, num_directions=3, batched_probes=True)
    decodings = count_calls(RowwiseInt8, "dequantize", monkeypatch)
    layers = len(quantized_layers(model))
    zo.estimate(loss_of(model))
    assert len(decodings) == len({id(layer) for layer in decodings}) == layers == 14
    decodings.clear()
    zo.evaluator.batched = False
    zo.estimate(loss_of(model))
    assert len(decodings) == 6 * layers


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in FORMATS), ("int8", torch.bfloat16), ("nf4 nested", torch.bfloat16)],
)
@EVERY_WAY
def test_batched_probes_are_sequential_ones(kind: str, way: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype=dtype)
    zo = engine(model, way, num_directions=2, eps=0.02)
    losses = []
    for batched in (False, True):
        zo.evaluator.batched = batched
        losses.append(zo.probe(loss_of(model)))
        zo.discard()
    assert (losses[0] - losses[1]).abs().max() < (5e-6 if dtype == torch.float32 else 0.03)


# Formats that can only be called.


class FakeGPTQ(nn.Module):
    """A layer as GPTQ's are: integers in buffers, no weight, decoded in its forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        step = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / step).round().to(torch.int32))
        self.register_buffer("scales", step)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), self.bias)


def opaque_model(build=tiny_llama) -> nn.Module:
    model = seeded(build)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, FakeGPTQ(module))
    return model


def test_an_opaque_layer_is_recognized_and_says_what_it_is() -> None:
    layers = quantized_layers(opaque_model())
    assert len(layers) == 14 and {type(layer) for layer in layers.values()} == {QuantizedLayer}
    layer = next(iter(layers.values()))
    assert layer.storage() == {} and layer.format == "a format that can only be read"
    assert quantized_layers(seeded(tiny_llama)) == {}


@pytest.mark.parametrize("way", ["factors", "norms"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt], ids=["llama", "opt"])
def test_opaque_layers_train_without_being_written(way: str, build) -> None:
    """Of factors, those of embeddings and the head move: PEFT cannot wrap layers that it does not know."""
    model = opaque_model(build)
    before = copies(dict(model.named_buffers()))
    zo = engine(model, "norms", num_directions=2) if way == "norms" else ZerothOrder(model, "low_rank")
    loss = loss_of(model)
    first = loss().item()
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=2e-3))
    for _ in range(30):
        zo.estimate(loss)
        optimizer.step()
    assert loss().item() < first
    at_the_end = loss().item()
    assert zo.finish() is model
    assert loss().item() == pytest.approx(at_the_end, rel=1e-4)
    assert_same_bits(copies({n: b for n, b in model.named_buffers() if n in before}), before)


def test_layers_of_codes_that_stay_are_named_with_their_share(caplog: pytest.LogCaptureFixture) -> None:
    """Once, at the start; a frozen layer is named too."""
    model = opaque_model()
    model.lm_head.weight.requires_grad_(False)
    with caplog.at_level("INFO", "zo_hf"):
        zo = ZerothOrder(model, "low_rank")
    codes = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("qweight"))
    total = codes + sum(p.numel() for p in model.parameters())
    share, frozen = 100 * codes / total, 100 * model.lm_head.weight.numel() / total
    lines = [(r.levelname, r.message) for r in caplog.records if "do not move" in r.message]
    assert len(lines) == 1 and lines[0][0] == "WARNING"
    assert f"FakeGPTQ (codes) {share:.1f}%, Linear (frozen) {frozen:.1f}%" in lines[0][1]
    assert zo.subspace.fold_steps == 50 and not zo.subspace.becomes_adapter


class FakeHQQ(nn.Module):
    """A layer as HQQ's and GGUF's are: integers in a parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = float(linear.weight.detach().abs().amax() / 127)
        codes = (linear.weight.detach() / self.step).round().to(torch.int8)
        self.W_q, self.bias = nn.Parameter(codes, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W_q.to(x.dtype) * self.step, self.bias)


def test_codes_in_parameters_are_codes_too(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(tiny_llama)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            model.set_submodule(name, FakeHQQ(module))
    with caplog.at_level("WARNING", "zo_hf"):
        zo = ZerothOrder(model, "low_rank")
    assert "FakeHQQ (codes)" in caplog.text
    assert set(zo.subspace.coordinates) == {n for n, p in model.named_parameters() if p.is_floating_point()}


@pytest.mark.parametrize(
    ("subspace", "options", "named"),
    [
        ("low_rank", {"fold_steps": 5}, "zo_fold_steps=5"),
        ("core", {"fold_steps": 5, "rank": 4}, "zo_fold_steps=5"),
        ("scales", {}, "zo_subspace='scales'"),
    ],
)
def test_what_would_write_an_opaque_layer_is_refused(subspace: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as refusal:
        SUBSPACES[subspace](opaque_model(), **options)
    message = str(refusal.value)
    assert named in message and "a format that can only be read" in message
    assert message.endswith(".") and ". " not in message
    assert parts_of(opaque_model()) == {}
