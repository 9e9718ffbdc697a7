"""What was saved is what is read back, whatever names transformers gives it in the file; if it cannot be, a run does not start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from tests.conftest import VOCABULARY, assert_same_bits, seeded, tiny_bert, tiny_mixtral, tiny_opt, weights_of
from tests.trainer.runs import SaveAt, make_trainer, trained, with_lora
from zo_hf.quantization import is_quantized
from zo_hf.trainer import manifest
from zo_hf.trainer.weights import load_weights

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGES |= {"image_size": 16, "patch_size": 8}


def tiny_vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**IMAGES, num_labels=3, initializer_range=0.2))


def tiny_neox() -> nn.Module:
    size = {name: SIZE[name] for name in SIZE if name not in ("num_key_value_heads", "head_dim")}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**size, max_position_embeddings=64))


def tiny_qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **EXPERTS))


def tiny_olmoe() -> nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2))


def tiny_deepseek() -> nn.Module:
    size = {name: SIZE[name] for name in SIZE if name != "head_dim"}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**size, **ranks, **experts, num_experts_per_tok=2, moe_intermediate_size=16)
    )


def tiny_gemma3() -> nn.Module:
    text = SIZE | {"sliding_window": 8, "vocab_size": 300}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=IMAGES, mm_tokens_per_image=4))


def tiny_qwen_vl() -> nn.Module:
    text = SIZE | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    vision |= {"patch_size": 8, "window_size": 16, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


# All of these have other names in a file than in memory, except the last two.
RENAMED: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    "gpt_neox": tiny_neox,
    "mixtral": tiny_mixtral,
    "qwen3_moe": tiny_qwen3_moe,
    "olmoe": tiny_olmoe,
    "deepseek_v3": tiny_deepseek,
    "gemma3": tiny_gemma3,
    "qwen2_5_vl": tiny_qwen_vl,
    "bert": tiny_bert,
    "opt": tiny_opt,
}


def random(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    model = seeded(build, dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_every_weight_is_read_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Into a model made from a config, and into one that was loaded, whose conversions transformers remembers."""
    saved = random(RENAMED[name], 1, dtype)
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    loaded.to(dtype).save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        for model in (random(RENAMED[name], 2, dtype), loaded):
            parameters = dict(model.named_parameters())
            for parameter in parameters.values():
                parameter.data.zero_()
            load_weights(model, folder)
            assert_same_bits(weights_of(model), weights_of(saved))
            assert all(parameter is parameters[key] for key, parameter in model.named_parameters())


def test_weights_of_mixed_precision_keep_it(tmp_path: Path) -> None:
    saved, model = random(tiny_mixtral, 1, torch.bfloat16), random(tiny_mixtral, 2, torch.bfloat16)
    for each in (saved, model):
        each.model.norm.weight.data = each.model.norm.weight.data.float() + 1e-4
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert_same_bits(weights_of(model), weights_of(saved))


def test_a_head_beside_a_loaded_encoder_is_read_back(tmp_path: Path) -> None:
    """The file of the encoder alone has no prefix, which transformers removes again when it saves the classifier."""
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = 2
    random(lambda: BertModel(config), 1).save_pretrained(tmp_path / "encoder")
    saved = type(seeded(tiny_bert)).from_pretrained(tmp_path / "encoder", num_labels=2)
    saved.save_pretrained(tmp_path / "saved")
    model = random(lambda: type(saved)(saved.config), 2)
    load_weights(model, tmp_path / "saved")
    assert_same_bits(weights_of(model), weights_of(saved))


def test_several_files_are_read(tmp_path: Path) -> None:
    saved, model = random(tiny_mixtral, 1), random(tiny_mixtral, 2)
    saved.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    load_weights(model, tmp_path)
    assert_same_bits(weights_of(model), weights_of(saved))


@pytest.mark.parametrize("name", ["gpt_neox", "vit", "opt"])
def test_a_missing_weight_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    random(RENAMED[name], 1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[sorted(key for key in tensors if "layer" in key)[0]]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = random(RENAMED[name], 2)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"has no .*layer.*; load weights of the same model") as refusal:
        load_weights(model, tmp_path)
    assert str(refusal.value).count(". ") == 0
    assert_same_bits(weights_of(model), before)


@pytest.mark.parametrize("lost", ["experts.2.w1.weight", "experts.2.w2.weight"])
def test_a_missing_expert_is_refused(tmp_path: Path, lost: str) -> None:
    """An expert is a part of a tensor of the model: of a product that is two of the file beside each other, or of one."""
    random(tiny_mixtral, 1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not ("layers.1" in name and name.endswith(lost))}
    assert len(kept) == len(tensors) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\..*experts.* is not complete, or in another format") as refusal:
        load_weights(random(tiny_mixtral, 2), tmp_path)
    assert str(refusal.value).count(". ") == 0


# In a run.

RUN = {"zo_fold_steps": 4, "learning_rate": 1e-3, "max_steps": 9}


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox", "qwen3_moe"])
def test_a_resumed_run_of_a_renamed_model_has_the_same_bits(tmp_path: Path, name: str) -> None:
    """At a fold the weights are those of the file; between folds those of the engine."""
    whole = trained(tmp_path / "whole", seeded(RENAMED[name]), more={"callbacks": [SaveAt(4, 6)]}, **RUN)
    for step in (4, 6):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = trained(tmp_path / str(step), seeded(RENAMED[name]), resume=str(folder), **RUN)
        assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_the_best_model_of_a_renamed_architecture_is_left(tmp_path: Path, name: str) -> None:
    options = RUN | {"learning_rate": 0.3, "load_best_model_at_end": True, "zo_fold_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path, seeded(RENAMED[name]), **options)
    assert trainer.state.best_global_step < trainer.state.global_step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    trained(tmp_path, seeded(tiny_opt), more={"callbacks": [SaveAt(4)]}, **RUN)
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.decoder.layers.0.fc1.weight"][3, 5] += 1e-4
    save_file(tensors, path, {"format": "pt"})
    manifest.write(path.parent)  # as if the weights had changed before they were written
    trainer = make_trainer(tmp_path, seeded(tiny_opt), **RUN)
    with pytest.raises(ValueError, match="does not give the weights that were saved there") as refusal:
        trainer.train(resume_from_checkpoint=True)
    assert str(refusal.value).count(". ") == 0


def test_another_dtype_is_noticed(tmp_path: Path) -> None:
    trained(tmp_path, seeded(tiny_opt), more={"callbacks": [SaveAt(4)]}, **RUN)
    with pytest.raises(ValueError, match=r"dtype='torch.float32' and this run has dtype='torch.bfloat16'"):
        trained(tmp_path, seeded(tiny_opt, torch.bfloat16), resume=True, **RUN)


# Adapters.


def two_adapters(*active: str) -> nn.Module:
    from peft import LoraConfig

    model: Any = with_lora(seeded(tiny_opt), target_modules=["q_proj"], r=2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(list(active))
    return model


@pytest.mark.parametrize("active", [("default", "other"), ("other",)], ids=["both", "the second"])
def test_active_adapters_resume(tmp_path: Path, active: tuple[str, ...]) -> None:
    options = {"max_steps": 7, "learning_rate": 1e-2}
    whole = trained(tmp_path / "whole", two_adapters(*active), more={"callbacks": [SaveAt(4)]}, **options)
    folder = tmp_path / "whole" / "checkpoint-4"
    resumed = trained(tmp_path / "again", two_adapters(*active), resume=str(folder), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert set(resumed.model.active_adapters) == set(active)
    moved = {name for name, tensor in weights_of(two_adapters(*active)).items()}
    start = weights_of(two_adapters(*active))
    moved = {name for name in moved if not torch.equal(start[name], weights_of(whole.model)[name])}
    assert all(any(f".{adapter}." in name for name in moved) for adapter in active)


def test_a_missing_adapter_is_refused(tmp_path: Path) -> None:
    options = {"max_steps": 7, "learning_rate": 1e-2}
    trained(tmp_path, with_lora(seeded(tiny_opt), target_modules=["q_proj"], r=2), save_strategy="steps", **options)
    with pytest.raises(ValueError, match=r"has no .*\.other\..*; give a checkpoint of a model with the same adapters"):
        trained(tmp_path, two_adapters("default", "other"), resume=True, **options)


def own_adapters(*names: str) -> nn.Module:
    from peft import LoraConfig

    model: Any = seeded(tiny_opt)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in names:
            model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=name)
    model.set_adapter(list(names))
    return model


def test_an_adapter_of_the_models_own_resumes(tmp_path: Path) -> None:
    options = {"max_steps": 7, "learning_rate": 1e-2, "zo_target_modules": ".*lora.*"}
    whole = trained(tmp_path / "whole", own_adapters("one"), more={"callbacks": [SaveAt(4)]}, **options)
    folder = tmp_path / "whole" / "checkpoint-4"
    resumed = trained(tmp_path / "again", own_adapters("one"), resume=str(folder), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_two_active_adapters_of_the_models_own_are_refused_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, own_adapters("one", "two"), save_strategy="steps")
    with pytest.raises(ValueError, match="transformers saves one active adapter") as refusal:
        trainer.train()
    assert str(refusal.value).count(". ") == 0 and trainer.state.global_step == 0


# Quantized models.


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize(("subspace", "folds"), [("low_rank", 4), ("scales", None)], ids=["folds", "scales"])
def test_quantized_models_with_renamed_weights_resume(
    tmp_path: Path, name: str, subspace: str, folds: int | None
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = seeded(RENAMED[name])
    plain.save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        eight_bit = BitsAndBytesConfig(load_in_8bit=True)
        model = type(plain).from_pretrained(tmp_path / "base", quantization_config=eight_bit, device_map="cpu").eval()
        assert is_quantized(model)
        return model

    options = {"zo_subspace": subspace, "zo_fold_steps": folds, "max_steps": 7, "learning_rate": 1e-2}
    whole = trained(tmp_path / "whole", load(), more={"callbacks": [SaveAt(4, 6)]}, **options)
    for step in (4, 6):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = trained(tmp_path / str(step), load(), resume=str(folder), **options)
        assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
