"""An adapter on a base that bitsandbytes has quantized: its codes stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import causal_batch, seeded, tiny_llama
from tests.subspaces.helpers import direction, sgd
from tests.subspaces.peft.test_methods import own_loss
from tests.trainer.runs import make_trainer
from zo_hf.engine import ZerothOrder
from zo_hf.quantization import quantized_layers

pytest.importorskip("bitsandbytes")

FORMATS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def quantized(folder: Path, form: str, adapter: str, moved: float = 0.1) -> nn.Module:
    """A tiny Llama, saved, loaded again in a format, with an adapter away from where it begins."""
    if not folder.exists():
        seeded(tiny_llama, hidden_size=64, initializer_range=0.2).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**FORMATS[form]), device_map="cpu", dtype=torch.float32
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(base, ADAPTERS[adapter]()).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=moved)
    return model


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything of the state dict that is no adapter."""
    kept = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    return {name: t for name, t in kept.items() if "default" not in name}


# PEFT's DoRA on int8 fails by itself at its second forward on a CPU.
@pytest.mark.parametrize(
    ("form", "adapter"), [(form, name) for form in FORMATS for name in ADAPTERS if (form, name) != ("int8", "dora")]
)
def test_probes_and_steps_leave_the_codes(form: str, adapter: str, tmp_path: Path) -> None:
    """And a probe's loss is that of another model in which the adapter's weights are written."""
    model, written = (quantized(tmp_path / "base", form, adapter) for _ in range(2))
    batch = causal_batch()
    for module, layer in quantized_layers(written).items():
        if layer.rounds_activations:  # probes take the exact product
            module.__dict__["forward"] = layer.forward
    quantized_layers(model)  # which moves int8 codes to where they stay
    codes = codes_of(model)
    assert any(t.dtype in (torch.int8, torch.uint8) for t in codes.values())
    zo = ZerothOrder(model, "adapter", eps=1e-2, num_directions=2, batched_probes=False)
    optimizer = sgd(zo, lr=0.1)
    losses = zo.probe(lambda: model(**batch).loss)
    named = dict(written.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
    for probe, loss in zip(zo.estimator.probes(), losses, strict=True):
        z = direction(zo.subspace, index=probe.direction)
        for name in z:
            named[name].data.copy_(torch.add(start[name], z[name], alpha=probe.scale))
        with torch.no_grad():
            assert loss.item() == pytest.approx(written(**batch).loss.item(), rel=1e-6)
    assert (losses[::2] - losses[1::2]).abs().min() > 1e-6
    zo.finish_estimate()
    optimizer.step()
    zo.finish()
    after = codes_of(model)
    assert after.keys() == codes.keys()
    for name, tensor in codes.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(("form", "adapter"), [("nf4", "lora"), ("nf4", "dora"), ("nf4", "ia3"), ("int8", "lora")])
def test_batched_probes_give_the_losses_of_sequential_ones(form: str, adapter: str, tmp_path: Path) -> None:
    """In int8 too: which columns of its inputs bitsandbytes takes for outliers depends on the other rows, but not here."""
    model = quantized(tmp_path / "base", form, adapter)
    loss = own_loss(model, causal_batch())
    zo = ZerothOrder(model, "adapter", num_directions=2, eps=0.05)
    losses = []
    for batched in (False, True):
        zo.evaluator.batched = batched
        losses.append(zo.probe(loss))
        zo.discard()
    assert torch.allclose(losses[0], losses[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_the_trainer_trains_it_and_peft_loads_it(form: str, tmp_path: Path) -> None:
    model = quantized(tmp_path / "base", form, "lora", moved=0.0)
    options = {"zo_normalize": True, "zo_num_directions": 4, "learning_rate": 0.02, "max_steps": 60}
    trainer = make_trainer(tmp_path / "out", model, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.98 * before
    trainer.save_model(str(tmp_path / "saved"))
    base = quantized(tmp_path / "base", form, "lora").unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    assert make_trainer(tmp_path / "out", loaded).evaluate()["eval_loss"] == pytest.approx(after, rel=1e-4)
