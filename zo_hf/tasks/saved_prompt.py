"""`prompt.json` beside a saved model: what the model has to be asked to classify a sentence."""

import json
from pathlib import Path

import torch
from torch import Tensor

from zo_hf.tasks.prompts import Prompt

FILE_NAME = "prompt.json"


def save_prompt(folder: Path, prompt: Prompt, prior: Tensor) -> None:
    """Write the prompt and the label prior, log-probabilities of shape (labels,), into a model's folder."""
    content = {"template": prompt.template, "verbalizers": list(prompt.verbalizers), "label_prior": prior.tolist()}
    (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_prompt(folder: Path) -> tuple[Prompt, Tensor]:
    """Read what `save_prompt` wrote.

    Raises:
        ValueError: the folder has no `prompt.json`.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}: name the output folder of a finished `zo-hf train`.")
    content = json.loads(path.read_text(encoding="utf-8"))
    return Prompt(content["template"], tuple(content["verbalizers"])), torch.tensor(content["label_prior"])
