"""A model from its config alone: every module and every shape, no weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_config(name: str) -> PretrainedConfig:
    """The config of a model: a folder with config.json, such a file itself, or a name on the hub.

    Raises:
        ValueError: there is none, or it is not a causal language model's.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model={name!r} has no config that can be read ({reason}); give a folder with config.json, the path of a "
            "config.json, or a name on the hub while it answers."
        ) from None
    check_config(config, name if not Path(name).exists() else str(name))
    return config


def check_config(config: PretrainedConfig, name: str | None = None) -> None:
    """Refuse what is not a causal language model.

    Raises:
        ValueError: it is not; the message says what it is.
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
            f"{kind}, which AutoModelForCausalLM does not know; plan takes causal language models such as Llama, OPT "
            "or GPT-2."
        )


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model on the meta device, in evaluation mode and without a key-value cache.

    Raises:
        ValueError: the model cannot be made with this attention.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    # What AutoConfig read from a quantised checkpoint; the plan quantises itself.
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
    """The model's stack of layers."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def shortened(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """The same model with its first `count` layers only."""
    short = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # a word for every layer
            setattr(short, name, value[:count])
    short.num_hidden_layers = count
    return short


def fill(model: nn.Module) -> None:
    """Replace everything on the meta device by tensors of the device that a model runs on; tied ones stay tied.

    To be called inside `without_values`, where these have no memory either.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty_like(old, device="cpu", requires_grad=False)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]


def tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    return [*model.parameters(), *model.buffers()]


def size_in_bytes(parts: list[Any]) -> int:
    """Bytes of a list of tensors."""
    return sum(part.numel() * part.element_size() for part in parts)
