"""The model of a job: its tokenizer and its weights, quantized and with an adapter if the job says so."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from zo_hf.tasks.loading import complete_model, loaded
from zo_hf.tasks.model_arguments import ModelArguments
from zo_hf.trainer.config import ZOConfig

REMEDY = "name the folder of a causal language model, or leave it out and use the embedded model with --offline"


def load_tokenizer(path: str, job: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ValueError: it does not exist, its files are damaged, or the hub does not deliver it.
    """
    return loaded(_named(path), lambda: AutoTokenizer.from_pretrained(path, local_files_only=job.offline), REMEDY)


def load_config(path: str, job: ModelArguments) -> PretrainedConfig:
    """Load the model's configuration, without its weights.

    Raises:
        ValueError: see `load_tokenizer`.
    """
    return loaded(_named(path), lambda: AutoConfig.from_pretrained(path, local_files_only=job.offline), REMEDY)


def load_model(path: str, job: ModelArguments, config: ZOConfig) -> Any:
    """Load the model on the run's device, quantized and with an adapter if the job says so.

    Raises:
        ValueError: the model does not exist, its files are damaged, or the hub does not deliver it.
    """
    more: dict[str, Any] = {}
    if job.load_in_8bit or job.load_in_4bit:
        more = {"device_map": {"": config.device}, "quantization_config": quantization(job)}
    attention = {"attn_implementation": "eager"} if config.settings().estimator_kind.needs_tangents else {}
    model = complete_model(
        _named(path),
        lambda: AutoModelForCausalLM.from_pretrained(
            path, dtype=job.dtype, local_files_only=job.offline, output_loading_info=True, **more, **attention
        ),
        REMEDY,
    )
    if not more:
        model.to(config.device)
    if job.use_peft:
        from peft import LoraConfig, get_peft_model

        targets = job.lora_target_modules
        torch.manual_seed(config.seed)  # PEFT draws the adapter from torch's own generator
        lora = LoraConfig(
            r=job.lora_r,
            lora_alpha=job.lora_alpha,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model.eval()


def _named(path: str) -> str:
    return f"--model_name_or_path {path}"


def quantization_of(model: Any) -> dict[str, Any] | None:
    """Return the quantization config of a model in the form that `from_pretrained` takes; None if it has none."""
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else json.loads(json.dumps(config.to_dict(), default=str))


def quantization(job: ModelArguments) -> BitsAndBytesConfig:
    """Return the config with which transformers quantizes the model."""
    if job.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=job.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=None if job.dtype == "auto" else job.dtype,
    )
