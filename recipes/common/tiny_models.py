"""Tiny models of many architectures of transformers, made from configs, each with a batch for its loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 4, 10, 64

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SEQ2SEQ = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.1,
}
_SPEECH = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
    "ctc_loss_reduction": "mean",
    "initializer_range": 0.1,
}


def _ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(5, 16, shape, generator=torch.Generator().manual_seed(seed))


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal() -> dict[str, Tensor]:
    """Return a batch for a language model: its tokens are the labels."""
    ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def translation() -> dict[str, Tensor]:
    """Return a batch for an encoder and a decoder."""
    return {"input_ids": _ids(0, ROWS, LENGTH), "labels": _ids(1, ROWS, 6)}


def classes() -> dict[str, Tensor]:
    """Return sentences with classes."""
    return {"input_ids": _ids(0, ROWS, LENGTH), "labels": torch.arange(ROWS) % 2}


def images() -> dict[str, Tensor]:
    """Return images with classes."""
    return {"pixel_values": _numbers(0, ROWS, 3, 16, 16), "labels": torch.arange(ROWS) % 2}


def larger_images() -> dict[str, Tensor]:
    """Return images of 32 × 32 pixels with classes."""
    return {"pixel_values": _numbers(0, ROWS, 3, 32, 32), "labels": torch.arange(ROWS) % 2}


def pairs() -> dict[str, Any]:
    """Return images with captions, for a contrastive loss."""
    ids = _ids(0, ROWS, LENGTH)
    ids[:, -1] = 63
    return {"input_ids": ids, "pixel_values": _numbers(0, ROWS, 3, 16, 16), "return_loss": True}


def waves() -> dict[str, Tensor]:
    """Return sounds with transcripts."""
    return {"input_values": _numbers(0, ROWS, 400), "labels": _ids(1, ROWS, 5)}


def spectra() -> dict[str, Tensor]:
    """Return spectrograms with transcripts."""
    return {"input_features": _numbers(0, ROWS, 8, 40), "labels": _ids(1, ROWS, 5)}


def sounds() -> dict[str, Tensor]:
    """Return spectrograms with classes."""
    return {"input_values": _numbers(0, ROWS, 24, 16), "labels": torch.arange(ROWS) % 2}


def image_prompts() -> dict[str, Tensor]:
    """Return an image with four patches in front of each text; token 3 stands for a patch."""
    ids = torch.cat([torch.full((ROWS, 4), 3), _ids(0, ROWS, LENGTH)], 1)
    return {"input_ids": ids, "pixel_values": _numbers(0, ROWS, 3, 16, 16), "labels": ids}


@dataclass(frozen=True)
class Architecture:
    """One architecture in a tiny size.

    Args:
        kind: its kind, such as "hybrid".
        model: name of the model's class in transformers.
        config: options of the config, beside those of its kind.
        base: options that all architectures of its kind share.
        batch: makes a batch.
        lora: target modules of LoRA. PEFT refuses some layers of state-space models.
    """

    kind: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: TEXT)
    batch: Callable[[], dict[str, Any]] = causal
    lora: str | tuple[str, ...] = "all-linear"

    def make(self, seed: int = 0) -> nn.Module:
        """Make the model in float64, in evaluation mode."""
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.base | dict(self.config)))
        if "num_experts" in self.config:
            model.set_experts_implementation("eager")  # the grouped product has no float64
        return model.double().eval()


_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
    "mamba_d_ssm": 64,
}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION_LANGUAGE = {"text_config": TEXT | {"model_type": "llama"}, "image_token_id": 3, "image_token_index": 3}
_CLIP = {
    "text_config": TEXT | {"eos_token_id": 63, "projection_dim": 16},
    "vision_config": _IMAGE | {"projection_dim": 16},
    "projection_dim": 16,
}

ARCHITECTURES = [
    *(
        Architecture("decoder", f"{name}ForCausalLM")
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi", "Phi3", "StableLm")
    ),
    *(
        Architecture("decoder", f"{name}ForCausalLM")
        for name in ("Olmo2", "Cohere", "Glm", "SmolLM3", "GPTNeoX", "Starcoder2", "Bloom", "Helium")
    ),
    Architecture("decoder", "FalconForCausalLM", base={k: v for k, v in TEXT.items() if k != "head_dim"}),
    Architecture("decoder", "GPT2LMHeadModel"),
    Architecture("decoder", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("decoder", "GPTJForCausalLM", {"rotary_dim": 4}),
    *(
        Architecture("mixture of experts", f"{name}ForCausalLM", _EXPERTS)
        for name in ("Mixtral", "Qwen3Moe", "Olmoe", "GraniteMoe", "GptOss")
    ),
    Architecture("mixture of experts", "Qwen2MoeForCausalLM", _EXPERTS | {"shared_expert_intermediate_size": 16}),
    Architecture(
        "mixture of experts", "DeepseekV3ForCausalLM", _EXPERTS | _MLA | {"num_key_value_heads": 4, "head_dim": 4}
    ),
    Architecture("state space", "MambaForCausalLM", {"state_size": 4}, lora=("in_proj", "x_proj")),
    Architecture("state space", "FalconMambaForCausalLM", {"state_size": 4}, lora=("in_proj", "x_proj")),
    Architecture(
        "state space",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
        lora=("in_proj",),
    ),
    Architecture("recurrent", "RwkvForCausalLM", {"attention_hidden_size": 32}),
    Architecture("hybrid", "RecurrentGemmaForCausalLM", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    Architecture("hybrid", "JambaForCausalLM", _EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 2}),
    Architecture("hybrid", "BambaForCausalLM", _MAMBA2 | {"attn_layer_indices": [1]}),
    Architecture("hybrid", "FalconH1ForCausalLM", _MAMBA2, lora=("in_proj", "q_proj", "up_proj")),
    Architecture(
        "hybrid",
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
        | {"n_groups": 1, "chunk_size": 4},
        lora=("in_proj", "q_proj"),
    ),
    Architecture("hybrid", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    Architecture(
        "hybrid", "Qwen3NextForCausalLM", _EXPERTS | _LINEAR_ATTENTION | {"shared_expert_intermediate_size": 16}
    ),
    *(
        Architecture("encoder", f"{name}ForSequenceClassification", batch=classes)
        for name in ("Bert", "Roberta", "Electra", "ModernBert", "XLMRoberta")
    ),
    Architecture("encoder", "AlbertForSequenceClassification", {"embedding_size": 16}, batch=classes),
    Architecture(
        "encoder", "DistilBertForSequenceClassification", {"dim": 32, "hidden_dim": 48, "n_layers": 2}, batch=classes
    ),
    *(
        Architecture(
            "encoder",
            f"{name}ForSequenceClassification",
            {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
            batch=classes,
        )
        for name in ("Deberta", "DebertaV2")
    ),
    Architecture("encoder", "BertForMaskedLM"),
    *(
        Architecture("encoder-decoder", f"{name}ForConditionalGeneration", base=TEXT | _SEQ2SEQ, batch=translation)
        for name in ("T5", "Bart", "MBart", "Pegasus", "LongT5")
    ),
    Architecture("encoder-decoder", "MarianMTModel", base=TEXT | _SEQ2SEQ, batch=translation),
    *(
        Architecture("vision", f"{name}ForImageClassification", base=_IMAGE, batch=images)
        for name in ("ViT", "DeiT", "Dinov2", "Beit")
    ),
    Architecture(
        "vision",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        {},
        larger_images,
    ),
    Architecture(
        "vision",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {},
        larger_images,
    ),
    Architecture(
        "vision",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        {},
        larger_images,
    ),
    Architecture("vision-language", "CLIPModel", _CLIP, {}, pairs),
    Architecture("vision-language", "SiglipModel", _CLIP, {}, pairs),
    Architecture(
        "vision-language",
        "LlavaForConditionalGeneration",
        _VISION_LANGUAGE | {"vision_config": _IMAGE | {"model_type": "clip_vision_model"}, "vision_feature_layer": -1},
        {},
        image_prompts,
    ),
    *(Architecture("speech", f"{name}ForCTC", base=_SPEECH, batch=waves) for name in ("Wav2Vec2", "Hubert", "WavLM")),
    Architecture(
        "speech",
        "WhisperForConditionalGeneration",
        {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16},
        TEXT | _SEQ2SEQ,
        spectra,
    ),
    Architecture(
        "speech",
        "ASTForAudioClassification",
        {"patch_size": 8, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        _IMAGE,
        sounds,
    ),
]
