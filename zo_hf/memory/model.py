"""Models built from their config alone, with every module and every shape but without weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from zo_hf.reason import reason_of


def load_config(name: str) -> PretrainedConfig:
    """Load the config of a model from a folder with config.json, from such a file, or by name from the hub.

    Raises:
        ValueError: no config can be read, or it is not that of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise ValueError(
            f"model={name!r} has no readable config ({reason}); give a folder with config.json, the path of a "
            "config.json, or a name on the hub while it can be reached."
        ) from None
    check_config(config, name if not Path(name).exists() else str(name))
    return config


def check_config(config: PretrainedConfig, name: str | None = None) -> None:
    """Refuse the config of a model that is not a causal language model.

    Raises:
        ValueError: the config is that of another kind of model; the message names the kind.
    """
    named = f"model={name or config.model_type!r}" if name is None else f"model={name!r}"
    kind = f"{named} is {config.model_type!r}"
    if config.is_encoder_decoder:
        raise ValueError(f"{kind}, an encoder-decoder; plan takes decoder-only models such as Llama, OPT or GPT-2.")
    is_decoder = config.to_dict().get("is_decoder", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise ValueError(f"{kind}, an encoder; plan takes decoder-only models such as Llama, OPT or GPT-2.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{kind}, which AutoModelForCausalLM does not support; plan takes causal language models such as Llama, OPT "
            "or GPT-2."
        )


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Build the model on the meta device, in evaluation mode and without a key-value cache.

    Raises:
        ValueError: the model does not support this attention implementation.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    # AutoConfig reads this from a quantized checkpoint; the plan models quantization itself.
    config.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except ValueError as error:
        raise ValueError(
            f"attention={attention!r} does not work for {config.model_type!r} ({str(error).split('. ')[0]}); use 'eager'."
        ) from None
    return model.eval()


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's stack of layers."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def shortened(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """Return the config of the same model with only its first `count` layers."""
    short = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # one entry a layer
            setattr(short, name, value[:count])
    short.num_hidden_layers = count
    return short


def fill(model: nn.Module) -> None:
    """Replace tensors on the meta device by CPU tensors; tied tensors stay tied.

    Call this inside `without_values`, where the new tensors take no memory either.
    """
    replacements: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in replacements:
                    new: Any = torch.empty_like(old, device="cpu", requires_grad=False)
                    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    replacements[id(old)] = new
                table[name] = replacements[id(old)]


def tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, each tied tensor once."""
    return [*model.parameters(), *model.buffers()]


def size_in_bytes(parts: list[Any]) -> int:
    """Return the total size of a list of tensors in bytes."""
    return sum(part.numel() * part.element_size() for part in parts)
