"""The file `prompt.json` in a saved model's folder, with the prompt that makes the model classify a sentence."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_hf.tasks.prompts import Prompt
from zo_hf.untrusted import plain_json
from zo_hf.untrusted.fields import Fits, distinct, first_misfit, is_number, is_object, is_text, list_of, maybe
from zo_hf.untrusted.quantization_config import loadable

FILE_NAME = "prompt.json"
MAX_LABELS = 4096

_FIELDS: dict[str, Fits] = {
    "template": lambda value: is_text(value) and value.count("{text}") == 1,
    "verbalizers": lambda value: distinct(is_text)(value) and 2 <= len(value) <= MAX_LABELS,
    "label_prior": list_of(is_number, 2, MAX_LABELS),
    "quantization": maybe(is_object),
}


def save_prompt(folder: Path, prompt: Prompt, prior: Tensor, quantization: dict[str, Any] | None = None) -> None:
    """Write the prompt of a model to `prompt.json` in its folder.

    Args:
        folder: the model's folder.
        prompt: the prompt.
        prior: log-probabilities of the labels on texts without content, (labels,).
        quantization: the quantization config of an adapter's base model, which PEFT does not save.
    """
    content = {
        "template": prompt.template,
        "verbalizers": list(prompt.verbalizers),
        "label_prior": prior.tolist(),
        "quantization": quantization,
    }
    (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_prompt(folder: Path) -> tuple[Prompt, Tensor]:
    """Read the prompt and the label prior, (labels,), that `save_prompt` wrote.

    Raises:
        ValueError: the folder has no `prompt.json`, or it does not hold a prompt.
    """
    content = _content(folder)
    return Prompt(content["template"], tuple(content["verbalizers"])), torch.tensor(content["label_prior"])


def load_quantization(folder: Path) -> dict[str, Any] | None:
    """Return the quantization config of the base model if the folder holds an adapter of a quantized one, else None.

    Raises:
        ValueError: see `load_prompt`.
    """
    return loadable(_content(folder).get("quantization"))


def _content(folder: Path) -> dict[str, Any]:
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}; name the output folder of a finished `zo-hf train`.")
    try:
        content = plain_json.read(path)
        reason = _why_unusable(content)
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise ValueError(f"{path} is not usable, because {reason}; train again, or use another copy of it.")
    prompt: dict[str, Any] = content
    return prompt


def _why_unusable(content: Any) -> str | None:
    """Return, as a clause, why a file's content is no saved prompt; None if it is one.

    Raises:
        ValueError: its quantization config cannot be loaded; the message is such a clause, too.
    """
    if not is_object(content):
        return "it is no object of JSON"
    wrong = first_misfit(content, _FIELDS)
    if wrong is not None:
        return f"{wrong} is missing or has a value that no training writes"
    if len(content["label_prior"]) != len(content["verbalizers"]):
        return "label_prior and verbalizers differ in length"
    loadable(content.get("quantization"))
    return None
