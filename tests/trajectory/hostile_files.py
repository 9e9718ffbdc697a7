"""Files beside a log, and descriptions of its base model, as somebody would write them who means harm."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# The starting weights of an adapter.


def _start(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    def write(content: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.safetensors")
            path.write_bytes(content)
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            change(tensors)
            save_file(tensors, path)
            return path.read_bytes()

    return write


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[-1]


def _safetensors(header: str, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


STARTS: dict[str, Callable[[bytes], bytes]] = {
    "of one number": _start(lambda t: t.update({_first(t): torch.zeros(1)})),
    "of no numbers": _start(lambda t: t.update({_first(t): torch.zeros(0)})),
    "transposed": _start(lambda t: t.update({_first(t): t[_first(t)].t().contiguous()})),
    "with one more dimension": _start(lambda t: t.update({_first(t): t[_first(t)][None]})),
    "much larger": _start(lambda t: t.update({_first(t): torch.zeros(1 << 20)})),
    "of integers": _start(lambda t: t.update({_first(t): t[_first(t)].long()})),
    "of flags": _start(lambda t: t.update({_first(t): t[_first(t)] > 0})),
    "complex": _start(lambda t: t.update({_first(t): t[_first(t)].to(torch.complex64)})),
    "in float8": _start(lambda t: t.update({_first(t): t[_first(t)].to(torch.float8_e4m3fn)})),
    "not a number": _start(lambda t: t[_first(t)].fill_(torch.nan)),
    "infinite": _start(lambda t: t[_first(t)].fill_(torch.inf)),
    "without one": _start(lambda t: t.pop(_first(t))),
    "without all": _start(lambda t: t.clear()),
    "with an unknown one": _start(lambda t: t.update({"no.such.weight": torch.zeros(2)})),
    "with a weight of the base": _start(
        lambda t: t.update({"base_model.model.model.decoder.final_layer_norm.bias": torch.zeros(3)})
    ),
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no safetensors": lambda content: b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.",
    "a zip archive": lambda content: b"PK\x03\x04" + bytes(100),
    "a header of 2**60 bytes": lambda content: (1 << 60).to_bytes(8, "little") + b"{}",
    "offsets outside of the file": lambda content: _safetensors(
        '{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}'
    ),
    "a shape that overflows": lambda content: _safetensors(
        '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'
    ),
    "a negative shape": lambda content: _safetensors(
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)
    ),
}


#: A module that a case puts on the path, and that must not be imported.
CANARY = "zo_hf_canary"

# The adapter's configuration, which names modules, files and models that PEFT would use.

_LORA = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8}
CONFIGS: dict[str, Any] = {
    "megatron": _LORA | {"megatron_config": {"a": 1}, "megatron_core": CANARY},
    "megatron core alone": _LORA | {"megatron_core": CANARY},
    "auto mapping": _LORA | {"auto_mapping": {"base_model_class": "x", "parent_library": CANARY}},
    "custom model": _LORA | {"custom_model": CANARY},
    "corda": _LORA
    | {"init_lora_weights": "corda", "corda_config": {"cache_file": "canary", "covariance_file": "canary"}},
    "eva": _LORA | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "loftq": _LORA | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "arrow": _LORA | {"arrow_config": {"task_names": ["a"], "arrow_router_temperature": 1.0}},
    "lora_ga": _LORA | {"lora_ga_config": {"x": 1}},
    "velora": _LORA | {"velora_config": {"x": 1}},
    "bdlora": _LORA | {"use_bdlora": {"x": 1}},
    "runtime": _LORA | {"runtime_config": {"ephemeral_gpu_offload": True}},
    "layer replication": _LORA | {"layer_replication": [[0, 1]] * 10_000},
    "rank of a billion": _LORA | {"r": 1 << 30},
    "rank of a million": _LORA | {"r": 1_000_000},
    "rank of zero": _LORA | {"r": 0},
    "negative rank": _LORA | {"r": -2},
    "rank as text": _LORA | {"r": "2"},
    "rank as a float": _LORA | {"r": 2.0},
    "rank pattern": _LORA | {"rank_pattern": {"q_proj": 1 << 30}},
    "slow pattern": _LORA | {"target_modules": "(a+)+$|((.*)*)*q_projx"},
    "slow pattern of ranks": _LORA | {"rank_pattern": {"(.*)*(.*)*x": 2}},
    "pattern that is none": _LORA | {"target_modules": "("},
    "all modules": _LORA | {"target_modules": ".*"},
    "no module": _LORA | {"target_modules": ["nothing"]},
    "alpha is not a number": '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
    "alpha is infinite": '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
    "not JSON": "{",
    "not an object": "[]",
    "not text": b"\xff\xfe\x00",
    "nested": "[" * 100_000,
    "r twice": '{"peft_type": "LORA", "r": 2, "r": 1073741824}',
    "no method": {"r": 2},
    "unknown method": {"peft_type": "__import__('os')"},
    "method as a list": {"peft_type": ["LORA"]},
    "another method": {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []},
    "prompt from a tokenizer": {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 2,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a",
        "tokenizer_name_or_path": "canary",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    "prompt from a file": {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 2,
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_state_dict_path": "canary.bin",
    },
    "prompt of a billion tokens": {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 1 << 30,
    },
    "prefix of a million tokens": {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 1 << 20,
    },
    "xlora": {"peft_type": "XLORA", "adapters": {"a": "canary"}, "hidden_size": 8},
    "cpt": {"peft_type": "CPT", "task_type": "CAUSAL_LM", "tokenizer_name_or_path": "canary"},
    "shadow": {"peft_type": "SHADOW", "shadow_model": "canary"},
    "unknown field": _LORA | {"new_option": 1},
    "unknown field of null": _LORA | {"new_option": None},
    "escape sequences": _LORA | {"\x1b[2J": "\x1b[2J"},
    "base of another": _LORA | {"base_model_name_or_path": "somebody/else", "revision": "main"},
    "task that is none": _LORA | {"task_type": "RUN_CODE"},
    "bias that is none": _LORA | {"bias": ["all"]},
    "modules to save": _LORA | {"modules_to_save": ["lm_head"]},
    "tokens": _LORA | {"trainable_token_indices": [1 << 40]},
    "target parameters": _LORA | {"target_parameters": ["x"]},
}


# What the header says about the base model, which decides the class, the dtype and the quantization that are loaded.

BASES: dict[str, dict[str, Any]] = {
    "class of nothing": {"class": "NoSuchModel"},
    "class that is a function": {"class": "pipeline"},
    "class that is a module": {"class": "os"},
    "class of Python": {"class": "__builtins__"},
    "class of all models": {"class": "PreTrainedModel"},
    "automatic class": {"class": "AutoModelForCausalLM"},
    "another class": {"class": "LlamaForCausalLM"},
    "no head": {"class": "OPTModel"},
    "class that is no text": {"class": ["OPTForCausalLM"]},
    "dtype of nothing": {"dtype": "float33"},
    "dtype that is a function": {"dtype": "load"},
    "dtype of integers": {"dtype": "int8"},
    "dtype of float8": {"dtype": "float8_e4m3fn"},
    "another dtype": {"dtype": "bfloat16"},
    "another device": {"device": "cuda"},
    "name of another": {"name": "somebody/else"},
    "name with escape sequences": {"name": "\x1b[2J\n"},
    "revision that is a path": {"revision": "../../x"},
    "quantization by nobody": {"quantization": {"quant_method": CANARY, "module": CANARY}},
    "quantization with a data set": {"quantization": {"quant_method": "gptq", "bits": 4, "dataset": "c4"}},
    "quantization with a module": {"quantization": {"quant_method": "bitsandbytes", "module": CANARY}},
    "quantization by a class": {
        "quantization": {"quant_method": "torchao", "quant_type": {"default": {"_type": CANARY, "_data": {}}}}
    },
    "quantization without a method": {"quantization": {"load_in_4bit": True}},
    "quantization as text": {"quantization": "bitsandbytes"},
}
