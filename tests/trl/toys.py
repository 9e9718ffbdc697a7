"""Toy models and data of TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tests.conftest import seeded

QUESTIONS = ("red or blue", "one or two")
ANSWERS = ("red", "one")
WORDS = ("<pad>", "<eos>", "<unk>", "red", "blue", "one", "two", "or", *(f"w{i}" for i in range(24)))


def toy_tokenizer() -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special)


def llama(kind: type = LlamaForCausalLM, **options: Any) -> Any:
    config = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return kind(LlamaConfig(**config | {"initializer_range": 0.2} | options))


def folder_of(name: str, folder: Path, tokenizer: Any) -> str:
    """A saved model and its tokenizer, for TRL's way of naming a model."""
    path = folder / "model"
    if name == "Reward":
        seeded(llama, kind=LlamaForSequenceClassification, num_labels=1).save_pretrained(path)
    else:
        seeded(llama).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def rows(*columns: str) -> Dataset:
    row = {
        "chosen": "{a} <eos>",
        "rejected": "w1 <eos>",
        "completion": "{a} <eos>",
        "prompt": "{q} ",
        "reference": "{a} <eos>",
    }
    values = [{c: row[c].format(q=q, a=a) for c in columns} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return Dataset.from_list(values * 4)


def unpaired() -> Dataset:
    made = [
        {"prompt": f"{q} ", "completion": f"{a} <eos>", "label": i == 0}
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    return Dataset.from_list(made * 4)


def config(kind: Any, folder: Path, **options: Any) -> Any:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return kind(str(folder), **defaults | options)


def lines_of(trainer: Any) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


#: Data and options of the ready-made trainers, by name.
READY: dict[str, tuple[Callable[[], Dataset], dict[str, Any]]] = {
    "SFT": (lambda: rows("prompt", "completion"), {"max_length": 16}),
    "DPO": (lambda: rows("prompt", "chosen", "rejected"), {"max_length": 16}),
    "KTO": (unpaired, {"max_length": 16}),
    "Reward": (lambda: rows("chosen", "rejected"), {"max_length": 16}),
    "CPO": (lambda: rows("prompt", "chosen", "rejected"), {"max_length": 16}),
    "ORPO": (lambda: rows("prompt", "chosen", "rejected"), {"max_length": 16}),
    "TPO": (lambda: rows("prompt", "chosen", "rejected", "reference"), {"max_length": 16}),
}
