"""The file `chat.json` in a saved model's folder: whether the model was trained on chats, and how its base was quantized."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_hf.untrusted import plain_json
from zo_hf.untrusted.fields import Fits, first_misfit, is_flag, is_object, maybe
from zo_hf.untrusted.quantization_config import loadable

FILE_NAME = "chat.json"

_FIELDS: dict[str, Fits] = {"is_chat": is_flag, "quantization": maybe(is_object)}


@dataclass(frozen=True)
class SavedChat:
    """The content of `chat.json`.

    Attributes:
        is_chat: whether the rows were messages, so that a prompt needs the chat template.
        quantization: the quantization config of an adapter's base model, which PEFT does not save; None without one.
    """

    is_chat: bool
    quantization: dict[str, Any] | None


def save_chat(folder: Path, is_chat: bool, quantization: dict[str, Any] | None) -> None:
    """Write `chat.json` in a model's folder; the arguments are the fields of `SavedChat`."""
    content = {"is_chat": is_chat, "quantization": quantization}
    (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_chat(folder: Path) -> SavedChat:
    """Read what `save_chat` wrote.

    Raises:
        ValueError: the folder has no `chat.json`, or it holds what no training writes.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}; name the output folder of a finished `zo-hf sft`.")
    try:
        content = plain_json.read(path)
        wrong = first_misfit(content, _FIELDS) if is_object(content) else "its object"
        reason = None if wrong is None else f"{wrong} is missing or has a value that no training writes"
        if reason is None:
            return SavedChat(content["is_chat"], loadable(content.get("quantization")))
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{path} is not usable, because {reason}; train again, or use another copy of it.")
