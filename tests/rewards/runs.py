"""Short runs that learn from rewards, with a tokenizer of words w0 to w99."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.conftest import VOCABULARY, seeded, tiny_llama
from zo_hf.rewards import EvolutionConfig, EvolutionTrainer

PAD, END, WANTED = "w0", "w1", "w7"
TEMPLATE = "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word wi, with a chat template: w2 before every message, w3 before the answer."""
    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w4"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token="w4")
    made.chat_template = TEMPLATE
    return made


def prompts(count: int = 8, **columns: list[Any]) -> Dataset:
    """Prompts of one to five words."""
    words = [" ".join(f"w{10 + (7 * row + 3 * i) % 80}" for i in range(1 + row % 5)) for row in range(count)]
    return Dataset.from_dict({"prompt": words, **columns})


def counts_wanted(completions: list[str], **_: Any) -> list[float]:
    """A reward: how often an answer has the wanted word."""
    return [float(completion.split().count(WANTED)) for completion in completions]


def odd_words(completions: list[str], **_: Any) -> list[float]:
    """A reward that every change of an answer changes: the sum of its words' numbers over 100."""
    return [sum(int(word[1:]) for word in completion.split()) / 100 for completion in completions]


def config(folder: Path | str, **options: Any) -> EvolutionConfig:
    """Arguments of a run of a few steps that neither saves nor reports unless asked to."""
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "zo_eps": 3e-2,
    }
    defaults |= {"population": 4, "max_completion_length": 4, "zo_fold_steps": 2, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return EvolutionConfig(output_dir=str(folder), **defaults | options)


def make_trainer(
    folder: Path | str, model: Any = None, rewards: Any = odd_words, more: dict[str, Any] | None = None, **options: Any
) -> EvolutionTrainer:
    """A trainer of `model` (default: a tiny Llama) on `prompts()`; `more` are its other arguments."""
    model = seeded(tiny_llama, eos_token_id=1) if model is None else model
    more = {"train_dataset": prompts(), "processing_class": tokenizer()} | (more or {})
    return EvolutionTrainer(model, rewards, config(folder, **options), **more)


def trained(folder: Path | str, *args: Any, resume: Any = None, **options: Any) -> EvolutionTrainer:
    """`make_trainer`, after its `train`."""
    trainer = make_trainer(folder, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
