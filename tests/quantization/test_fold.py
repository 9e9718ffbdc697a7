"""A fold into a quantized model: what rounding to nearest would lose stays, on average, in the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_opt
from tests.quantized_models import FORMATS, decoded, dequantized, layer_of, parts_of, quantize, quantized_linear
from tests.subspaces.helpers import move_off_the_origin
from zo_hf.quantization import QuantizedLayer, quantized_layers, stored_tensors
from zo_hf.quantization.rowwise import HEADROOM, RowwiseInt8
from zo_hf.subspaces import SUBSPACES, LowRank, code_rounding

EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS)


def smallest_steps(layer: QuantizedLayer) -> Tensor:
    """What lies at least between two neighboring values of each element, (m, n)."""
    if layer.format.startswith("int8"):
        return layer.units(layer.storage())[:, None].expand(layer.shape)  # type: ignore[attr-defined]
    scales = layer._scales(layer.storage(), 0, layer.shape.numel())  # type: ignore[attr-defined]
    blocks = scales.repeat_interleave(64)[: layer.shape.numel()].view(layer.shape)
    return blocks * layer.module.weight.quant_state.code.unique().diff().min()


def make_room(model: nn.Module) -> None:
    """Give 8-bit rows the scale that they have after they have grown, for a row that grows is rounded as a whole."""
    for layer in quantized_layers(model).values():
        if isinstance(layer, RowwiseInt8):
            storage, rows = layer.storage(), decoded(layer)
            layer.set_units(storage, 0, layer.units(storage) * HEADROOM)
            layer.requantize(storage, 0, len(rows), rows, torch.full(rows.shape, 32767))


@EVERY_FORMAT
def test_a_fold_keeps_the_expected_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step downhill, every element of which is less than half a code: the mean loss over seeds is that of the step."""
    model = quantize(seeded(tiny_llama, hidden_size=64, intermediate_size=128, num_hidden_layers=1), kind)
    make_room(model)
    space = LowRank(model, fold_steps=5, target_modules=r".*_proj\.weight")
    batch, plain = causal_batch(16), dequantized(model)
    weights = {site.name: plain.get_submodule(site.name.removesuffix(".weight")).weight for site in space.sites}
    start = plain(**batch).loss
    start.backward()
    down = {name: -weight.grad @ space.basis(name) for name, weight in weights.items()}
    steps = {site.name: smallest_steps(site.layer) for site in space.sites}
    size = min(
        float((0.45 * steps[name] / (b @ space.basis(name).t()).abs().clamp(min=1e-12)).min())
        for name, b in down.items()
    )

    def loss_with(change: dict[str, Tensor]) -> float:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(decoded_of(model, name) + change[name])
            return plain(**batch).loss.double().item()

    wanted = loss_with({name: size * b @ space.basis(name).t() for name, b in down.items()}) - start.item()
    assert wanted < -1e-5
    zero = {name: torch.zeros(()) for name in down}
    before = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}

    def folded_loss(step: int) -> float:
        for name, tensor in stored_tensors(model).items():
            tensor.detach().copy_(before[name])
        space.draw_bases(0)
        for name, b in down.items():
            space.coordinates[name].data.copy_(size * b)
        space.fold(step, {})
        return loss_with(zero) - start.item()

    count = 60
    found = torch.tensor([folded_loss(step) for step in range(1, count + 1)])
    error = found.std() / count**0.5
    # Beside the standard error, half the curvature of the loss times the rounding's variance.
    assert abs(found.mean() - wanted) < 4 * error + 0.15 * abs(wanted)
    assert found.mean() < -4 * error

    monkeypatch.setattr(code_rounding, "draw_uniform", lambda s, n, a, b, device: torch.full((b - a,), 32767))
    assert folded_loss(1) == pytest.approx(0.0, abs=0.02 * abs(wanted))  # rounded to nearest, all of it is lost


def decoded_of(model: nn.Module, name: str) -> Tensor:
    return decoded(layer_of(model.get_submodule(name.removesuffix(".weight"))))


@EVERY_FORMAT
@pytest.mark.parametrize(
    ("subspace", "rounding"), [(s, r) for s in ("low_rank", "core") for r in ("stochastic", "gptq")]
)
def test_the_folded_state_dict_is_what_a_fold_writes(kind: str, subspace: str, rounding: str) -> None:
    """A checkpoint written in the middle and the model a moment later; the bias of a layer is folded beside its codes."""
    model = quantize(seeded(tiny_opt, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64), kind)
    space = SUBSPACES[subspace](model, rank=4, fold_steps=5, fold_rounding=rounding)
    before = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}
    move_off_the_origin(space)
    decay = dict.fromkeys(space.factored, 0.99)
    state = space.folded_state_dict(7, decay)
    assert_same_bits({name: tensor.detach() for name, tensor in stored_tensors(model).items()}, before)
    space.fold(7, decay)
    prefix = "model.decoder.layers.0.fc1."
    after = {f"{prefix}{part}": t for part, t in layer_of(model.get_submodule(prefix[:-1])).storage().items()}
    if kind == "torchao":
        after = {f"{prefix}{name}": getattr(state[f"{prefix}weight"], name) for name in ("qdata", "scale")}
        held = layer_of(model.get_submodule(prefix[:-1])).storage()
        assert all(torch.equal(after[prefix + name], held[f"weight.{name}"]) for name in ("qdata", "scale"))
    else:
        assert all(torch.equal(state[name], tensor) for name, tensor in after.items() if name in state)
        assert f"{prefix}weight" in state
    assert torch.equal(state[f"{prefix}bias"], model.get_submodule(prefix[:-1]).bias)
    assert space.fold_error is not None and 0 < space.fold_error < 0.3


@EVERY_FORMAT
@pytest.mark.parametrize("rounding", ["stochastic", "gptq"])
def test_the_rounding_depends_on_the_seed_and_the_step_alone(kind: str, rounding: str) -> None:
    results = []
    for seed, step in ((1, 5), (1, 5), (1, 10), (2, 5)):
        model = quantize(seeded(tiny_llama, hidden_size=64, intermediate_size=128), kind)
        space = LowRank(model, fold_steps=5, seed=seed, fold_rounding=rounding)
        space.draw_bases(0)
        move_off_the_origin(space)
        space.fold(step, {})
        results.append(parts_of(model))
    assert_same_bits(results[0], results[1])
    for other in results[2:]:
        assert any(not torch.equal(other[name], results[0][name]) for name in other)


def test_outliers_of_the_input_meet_the_folded_weight() -> None:
    """LLM.int8() multiplies columns beyond its threshold in float16, with weights that it reads from the codes."""
    layer = quantized_linear(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8, None, "int8")
    layer.state.threshold = 6.0
    model = nn.Sequential(layer)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[:, 9] = 40.0
    only_outliers = torch.zeros(5, 64)
    only_outliers[:, 9] = 40.0
    with torch.no_grad():
        before = layer(x)
        space = LowRank(model, fold_steps=5)
        move_off_the_origin(space, 0.2)
        space.fold(5, {})
        view = next(iter(quantized_layers(model).values()))
        assert (before - view.linear(x)).abs().max() > 1
        assert (layer(x) - view.linear(x)).abs().max() < 0.02 * view.linear(x).abs().max()
        torch.testing.assert_close(layer(only_outliers), view.linear(only_outliers), rtol=5e-3, atol=5e-3)
