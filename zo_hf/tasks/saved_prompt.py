"""The file `prompt.json` in a saved model's folder, with the prompt that makes the model classify a sentence."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_hf.tasks.prompts import Prompt

FILE_NAME = "prompt.json"


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
    """Read the prompt and the label prior that `save_prompt` wrote.

    Raises:
        ValueError: the folder has no `prompt.json`.
    """
    content = _content(folder)
    return Prompt(content["template"], tuple(content["verbalizers"])), torch.tensor(content["label_prior"])


def load_quantization(folder: Path) -> dict[str, Any] | None:
    """Return the quantization config of the base model if the folder holds an adapter of a quantized one, else None."""
    quantization: dict[str, Any] | None = _content(folder).get("quantization")
    return quantization


def _content(folder: Path) -> dict[str, Any]:
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}; name the output folder of a finished `zo-hf train`.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
