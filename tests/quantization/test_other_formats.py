"""Formats that are read and never written: adapter, norms and factors train over them, and no code or scale changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.conftest import causal_batch
from tests.quantization.runs import write_base
from tests.quantization.stand_ins import FORMATS, WRAPPED, coded_tensors, model_in
from tests.quantized_models import HAS_TORCHAO
from tests.trainer.runs import logged, make_trainer, with_lora
from tests.trainer.test_refusals import refused, trains
from zo_hf.engine import ZerothOrder
from zo_hf.quantization import QuantizedLayer, coded_layers, quantized_layers
from zo_hf.subspaces import LowRank
from zo_hf.subspaces.reports import what_stays

EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS)
#: Layers without `in_features`, which no subspace moves, so that folds write what is around them.
NOT_LINEAR = ("EETQ", "experts")
WAYS: dict[str, dict[str, Any]] = {
    "adapter": {"zo_subspace": "adapter", "zo_fold_steps": None},
    "norms": {"zo_subspace": "norms", "zo_fold_steps": None},
    "factors": {"zo_subspace": "low_rank", "zo_fold_steps": None},
    "folds": {"zo_subspace": "low_rank", "zo_fold_steps": 3},
}
CASES = [(kind, way) for kind in FORMATS for way in ("norms", "factors")]
CASES += [(kind, "adapter") for kind in WRAPPED] + [(kind, "folds") for kind in NOT_LINEAR]
REFUSED = [(kind, "scales", "zo_subspace='scales'") for kind in FORMATS]
REFUSED += [(kind, "folds", "zo_fold_steps=3") for kind in FORMATS if kind not in NOT_LINEAR]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Compare bytes, because float8 has no equality."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in expected.items()
    )


@EVERY_FORMAT
def test_codes_are_recognized_and_their_scales_never_move(kind: str) -> None:
    """Transformers leaves `requires_grad` of some of these scales and codes set."""
    model = model_in(kind)
    assert len(coded_layers(model)) == (1 if kind == "experts" else 7)
    assert len(quantized_layers(model)) == (0 if kind in NOT_LINEAR else 7)
    parts = {name for name, p in model.named_parameters() if "scale" in name}
    for way in ("norms", "low_rank"):
        moving = ZerothOrder(model_in(kind), way).subspace.coordinates.keys()
        assert moving and not moving & parts


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_it_trains_and_no_code_changes(tmp_path: Path, kind: str, way: str) -> None:
    model = with_lora(model_in(kind)) if way == "adapter" else model_in(kind)
    before = coded_tensors(model)
    trainer = make_trainer(tmp_path, model, max_steps=4, learning_rate=1e-2, **WAYS[way])
    start = trainer.model.model if way == "adapter" else trainer.model
    norms = {name: p.detach().clone() for name, p in start.named_parameters() if name.endswith("norm.weight")}
    trainer.train()
    assert same(coded_tensors(trainer.model), before)
    assert all(logged(trainer, "zo/projected_grad"))
    assert isinstance(trainer.model, PeftModel) == (way == "adapter" or (way == "factors" and kind in WRAPPED))
    if way == "norms":
        assert any(not torch.equal(dict(trainer.model.named_parameters())[name], old) for name, old in norms.items())


@pytest.mark.parametrize("kind", WRAPPED)
def test_factors_beside_the_codes_become_the_same_model_with_an_adapter(tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(tmp_path, model_in(kind), max_steps=4, learning_rate=1e-2, zo_fold_steps=None)
    trainer.train()
    inputs = {name: tensor for name, tensor in causal_batch(3).items() if name != "labels"}
    with torch.no_grad():
        found = trainer.model.eval()(**inputs).logits
        plain = model_in(kind).eval()
        assert (plain(**inputs).logits - found).abs().max() > 1e-4
        for name, module in trainer.model.named_modules():
            if hasattr(module, "lora_A"):
                change = module.lora_B["default"].weight @ module.lora_A["default"].weight
                layer = plain.get_submodule(name.removeprefix("base_model.model."))
                add_to_output(layer, change)
        torch.testing.assert_close(plain(**inputs).logits, found, rtol=1e-4, atol=1e-5)


def add_to_output(layer: nn.Module, change: Tensor) -> None:
    """Let a layer add x · changeᵀ to its output."""
    layer.register_forward_hook(lambda _, args, output: output + args[0] @ change.t())


@EVERY_FORMAT
def test_probes_change_no_code(kind: str) -> None:
    model = model_in(kind)
    before = coded_tensors(model)
    zo = ZerothOrder(model, "low_rank", num_directions=2)
    batch = causal_batch(4)
    assert zo.estimate(lambda: model(**batch).loss).is_finite
    assert same(coded_tensors(model), before)


@pytest.mark.parametrize(("kind", "way", "named"), REFUSED)
def test_what_would_write_codes_is_refused(tmp_path: Path, kind: str, way: str, named: str) -> None:
    options = WAYS.get(way, {"zo_subspace": way, "zo_fold_steps": None})
    refused(named, lambda: trains(make_trainer(tmp_path, model_in(kind), **options)))


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")
@pytest.mark.parametrize("way", ["factors", "norms", "adapter"])
def test_real_weight_only_fp8_of_torchao(tmp_path: Path, way: str) -> None:
    from torchao.quantization import Float8WeightOnlyConfig

    config = TorchAoConfig(Float8WeightOnlyConfig())
    base = write_base(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    layers = quantized_layers(model).values()
    assert len(layers) == 7 and {type(layer) for layer in layers} == {QuantizedLayer}
    before = [layer.module.weight.dequantize().clone() for layer in layers]
    if way == "adapter":
        model = with_lora(model)
    trainer = make_trainer(tmp_path / "run", model, max_steps=3, learning_rate=1e-2, **WAYS[way])
    trainer.train()
    assert all(torch.equal(layer.module.weight.dequantize(), old) for layer, old in zip(layers, before, strict=True))
    assert all(logged(trainer, "zo/projected_grad"))


class Masked(nn.Linear):
    """A pruned layer, whose plain weight has a parameter of bits or integers beside it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(8, 8)
        self.mask = nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_a_plain_weight_beside_integers_moves(dtype: torch.dtype) -> None:
    model = nn.Sequential(Masked(dtype), nn.LayerNorm(8))
    assert set(LowRank(model).coordinates) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert not coded_layers(model) and not quantized_layers(model)


def test_codes_of_experts_in_8_bit_floats_are_counted_once() -> None:
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.zeros(2, 8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), experts)
    assert what_stays(LowRank(model)) == "50.0% of the parameters do not move: Module (codes) 50.0%"


def test_a_weight_of_a_tensor_class_of_quanto_is_taken_for_codes() -> None:
    """It claims to be float32, and a step would write through it."""
    kind: Callable[..., Any] = type("WeightQBytesTensor", (torch.Tensor,), {"__module__": "optimum.quanto.tensor"})
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    weight = model[0].weight.detach().as_subclass(kind)
    model[0]._parameters["weight"] = weight
    assert list(coded_layers(model)) == [model[0]]
    assert set(LowRank(model, fold_steps=0, target_modules=["0.weight"]).coordinates) == {"0.weight"}
    with pytest.raises(ValueError, match=r"zo_fold_steps=5"):
        LowRank(model, fold_steps=5)
