"""Answers of a model that `zo-hf sft` has trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf.checkpoint import holds_adapter
from zo_hf.subspaces.adapter_config import read_adapter_config
from zo_hf.tasks.loading import complete_model, loaded, reason
from zo_hf.tasks.saved_chat import load_chat


@dataclass(frozen=True)
class Answering:
    """A model and how it answers.

    Attributes:
        model: the model.
        tokenizer: its tokenizer, with a chat template if `is_chat`.
        is_chat: whether the model was trained on messages; if not, it continues the last text as it is.
        max_new_tokens: maximum number of tokens of an answer.
        temperature: 0 takes the most probable token each time.
    """

    model: Any
    tokenizer: Any
    is_chat: bool
    max_new_tokens: int
    temperature: float

    def answer(self, turns: Sequence[tuple[str, str]]) -> str:
        """Return the model's answer.

        Args:
            turns: role ("user" or "assistant") and text of each message so far; the last one is the user's.

        Raises:
            ValueError: the messages have more tokens than the model has positions, or the template does not take them.
        """
        inputs = self._tokens(turns).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        positions = self._positions()
        if not length:
            raise ValueError("the message has no tokens; write another one.")
        if positions is not None and length >= positions:
            raise ValueError(
                f"the message has {length} tokens, and the model has {positions} positions; write a shorter one."
            )
        most = self.max_new_tokens if positions is None else min(self.max_new_tokens, positions - length)
        drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            drawing = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        pad = self.tokenizer.pad_token_id
        made = self.model.generate(
            **inputs,
            **drawing,
            max_new_tokens=most,
            eos_token_id=list(dict.fromkeys([self.tokenizer.eos_token_id, *ends])),
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        text: str = self.tokenizer.decode(made[0, length:], skip_special_tokens=True)
        return text.strip()

    def fits(self, turns: Sequence[tuple[str, str]]) -> bool:
        """Return whether an answer of full length has positions after these messages."""
        positions = self._positions()
        if positions is None:
            return True
        return bool(self._tokens(turns)["input_ids"].shape[1] + self.max_new_tokens <= positions)

    def _tokens(self, turns: Sequence[tuple[str, str]]) -> Any:
        if not self.is_chat:
            return self.tokenizer(turns[-1][1], return_tensors="pt", return_token_type_ids=False)
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(
                f"the chat template does not take the messages ({reason(error)}); write others."
            ) from error

    def _positions(self) -> int | None:
        return getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )  # not every model has some


def load_answering(folder: Path, max_new_tokens: int, temperature: float) -> Answering:
    """Load the model in a folder.

    Args:
        folder: the output folder of a finished `zo-hf sft`.
        max_new_tokens: see `Answering`.
        temperature: see `Answering`.

    Raises:
        ValueError: the folder has no chat.json, its files are damaged, or it has an adapter's configuration that zo_hf does
            not hand to PEFT.
    """
    saved = load_chat(folder)
    if holds_adapter(folder):  # transformers gives PEFT the whole file
        read_adapter_config(folder)
    more: dict[str, Any] = {}
    if saved.quantization is not None:
        more = {"quantization_config": saved.quantization, "device_map": "auto"}
    remedy = "name the output folder of a finished `zo-hf sft`"
    tokenizer = loaded(f"the tokenizer in {folder}", lambda: AutoTokenizer.from_pretrained(folder), remedy)
    if saved.is_chat and tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {folder} has no chat template; {remedy}.")
    model = complete_model(
        f"the model in {folder}",
        lambda: AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more),
        remedy,
    )
    if not all(bool(part.isfinite().all()) for part in model.parameters() if part.is_floating_point()):
        raise ValueError(f"the model in {folder} holds weights that are not finite; {remedy}.")
    if not more and torch.cuda.is_available():
        model.to("cuda")
    return Answering(model.eval(), tokenizer, saved.is_chat, max_new_tokens, temperature)
