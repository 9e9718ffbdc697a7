"""Adapters by transformers' own `model.add_adapter(...)`, LoRA on experts, and LoRA on tied embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_mixtral, tiny_opt, weights_of
from tests.quantized_models import quantize
from tests.subspaces.helpers import direction
from tests.trainer.runs import logged, trained
from zo_hf.engine import ZerothOrder
from zo_hf.subspaces.peft_methods import base_model, is_peft
from zo_hf.trajectory import replay


def with_own_adapter(quantized: bool = False) -> nn.Module:
    model = seeded(tiny_llama)
    if quantized:
        model = quantize(model)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_without_a_wrapper_is_the_subspace(tmp_path: Path, quantized: bool) -> None:
    """It alone moves, at an adapter's rate and ε; what is saved is the adapter."""
    before = weights_of(with_own_adapter(quantized))
    trainer = trained(tmp_path, with_own_adapter(quantized), learning_rate=None, max_steps=3)
    assert is_peft(trainer.model) and base_model(trainer.model) is trainer.model
    moved = {name for name, tensor in weights_of(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert logged(trainer, "learning_rate")[0] > 5e-5
    trainer.save_model()
    again = quantize(seeded(tiny_llama)) if quantized else seeded(tiny_llama)
    again.load_adapter(str(tmp_path))
    batch = causal_batch()
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, trainer.model(**batch).logits, atol=1e-6)


def test_its_run_resumes_and_replays_to_the_bit(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", with_own_adapter(), **options)
    folder = str(tmp_path / "whole" / "checkpoint-2")
    resumed = trained(tmp_path / "again", with_own_adapter(), resume=folder, **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert_same_bits(weights_of(replay(with_own_adapter(), tmp_path / "whole")), weights_of(whole.model))


def test_its_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trained(tmp_path, with_own_adapter(), load_best_model_at_end=True, learning_rate=0.5, **options)
    losses = logged(trainer, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def tiny_qwen3_moe() -> nn.Module:
    size = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, moe_intermediate_size=16, initializer_range=0.1))


@pytest.mark.parametrize("build", [tiny_qwen3_moe, tiny_mixtral])
def test_lora_on_experts_is_perturbed_where_peft_reads_it(build, tmp_path: Path) -> None:
    """c is autograd's slope along z, over the experts' adapters too; and PEFT alone loads what was saved."""

    def made() -> PeftModel:
        model = seeded(build)
        model.set_experts_implementation("eager")
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()

    model, batch = made().double(), causal_batch()
    zo = ZerothOrder(model, "adapter", eps=1e-3, batched_probes=False)
    experts = [name for name in zo.subspace.coordinates if "experts" in name]
    assert any("lora_A" in name for name in experts) and any("lora_B" in name for name in experts)
    c = zo.estimate(lambda: model(**batch).loss).projected_gradients[0]
    assert all(zo.subspace.coordinates[name].grad is not None for name in experts)
    assert c == pytest.approx(slope(zo, model, batch), rel=1e-6)
    trainer = trained(tmp_path, made(), max_steps=2)
    trainer.save_model()
    base = seeded(build)
    base.set_experts_implementation("eager")
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, trainer.model(**batch).logits, atol=1e-6)


def test_lora_on_tied_embeddings_moves_both_uses() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    torch.manual_seed(1)
    model, batch = get_peft_model(seeded(tiny_opt, torch.float64), config).eval(), causal_batch()
    zo = ZerothOrder(model, "adapter", eps=1e-4, batched_probes=False)
    c = zo.estimate(lambda: model(**batch).loss).projected_gradients[0]
    assert "lm_head" not in "".join(zo.subspace.coordinates)
    assert c == pytest.approx(slope(zo, model, batch), rel=1e-6)


def slope(zo: ZerothOrder, model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The slope of the loss along the first direction, with the weights written."""
    z, eps = direction(zo.subspace), zo.estimator.eps
    zo.subspace.detach()
    start, ends = {name: p.detach().clone() for name, p in zo.subspace.coordinates.items()}, []
    for sign in (1, -1):
        for name, p in zo.subspace.coordinates.items():
            p.data.copy_(start[name] + sign * eps * z[name])
        with torch.no_grad():
            ends.append(model(**batch).loss.item())
    return (ends[0] - ends[1]) / (2 * eps)
