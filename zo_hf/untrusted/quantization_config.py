"""Quantization settings that a file names for its base model: formats that zo_hf quantizes to, with plain options."""

from __future__ import annotations

from typing import Any

from zo_hf.untrusted.fields import (
    Fits,
    brief,
    first_misfit,
    is_flag,
    is_number,
    is_object,
    is_text,
    list_of,
    maybe,
    one_of,
    shown,
    whole,
)

_BITSANDBYTES: dict[str, Fits] = {
    "_load_in_4bit": maybe(is_flag),
    "_load_in_8bit": maybe(is_flag),
    "load_in_4bit": maybe(is_flag),
    "load_in_8bit": maybe(is_flag),
    "bnb_4bit_compute_dtype": maybe(one_of("float16", "bfloat16", "float32", "float64")),
    "bnb_4bit_quant_storage": maybe(one_of("uint8", "int8", "float16", "bfloat16", "float32")),
    "bnb_4bit_quant_type": maybe(one_of("nf4", "fp4")),
    "bnb_4bit_use_double_quant": maybe(is_flag),
    "llm_int8_enable_fp32_cpu_offload": maybe(is_flag),
    "llm_int8_has_fp16_weight": maybe(is_flag),
    "llm_int8_skip_modules": maybe(list_of(is_text, most=4096)),
    "llm_int8_threshold": maybe(is_number),
}
_TORCHAO: dict[str, Fits] = {
    "quant_type": lambda value: (
        is_object(value) and value.keys() == {"default"} and _is_torchao_type(value["default"])
    ),
    "modules_to_not_convert": maybe(list_of(is_text, most=4096)),
    "include_input_output_embeddings": maybe(is_flag),
    "untie_embedding_weights": maybe(is_flag),
}
_TORCHAO_TYPES = one_of("Int8WeightOnlyConfig", "PerRow", "PerTensor", "PerGroup")
_METHODS = {"bitsandbytes": _BITSANDBYTES, "torchao": _TORCHAO}


def loadable(config: Any) -> dict[str, Any] | None:
    """Return the part of a quantization config that may be handed to `from_pretrained`.

    Args:
        config: what the file holds; None if the model was not quantized.

    Returns:
        The config; None for a model that was not quantized, or whose format (such as GPTQ) is described beside its own
        weights.

    Raises:
        ValueError: an option is unknown or has a value that no run writes; the message gives the reason as a clause.
    """
    if config is None:
        return None
    if not is_object(config) or not is_text(config.get("quant_method")):
        raise ValueError("its quantization names no method")
    table = _METHODS.get(config["quant_method"])
    if table is None:
        return None
    options = {name: value for name, value in config.items() if name != "quant_method"}
    wrong = next((name for name in options if name not in table), None) or first_misfit(options, table)
    if wrong is not None:
        raise ValueError(f"its quantization has {shown(wrong)}={brief(options.get(wrong))}, which no run writes")
    return dict(config)


def _is_torchao_type(value: Any) -> bool:
    """Return whether torchao's description of an object is of a known class, with plain values inside."""
    if not is_object(value) or value.keys() - {"_type", "_version", "_data"} or not _TORCHAO_TYPES(value.get("_type")):
        return False
    inner = value.get("_data", {})
    plain = maybe(lambda one: is_flag(one) or whole(-(1 << 31))(one) or _is_torchao_type(one))
    return maybe(whole())(value.get("_version")) and is_object(inner) and all(map(plain, inner.values()))
