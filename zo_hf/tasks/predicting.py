"""Labels of sentences by a model that `zo-hf train` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf.checkpoint import holds_adapter
from zo_hf.subspaces.adapter_config import read_adapter_config
from zo_hf.tasks.classify import calibrated, label_scores
from zo_hf.tasks.loading import complete_model, loaded
from zo_hf.tasks.saved_prompt import load_prompt, load_quantization


def predict(folder: Path, sentences: list[str], calibrate: bool = False) -> list[tuple[str, float]]:
    """Return the most probable label word of each sentence, and its probability among the label words.

    Raises:
        ValueError: the folder has no prompt.json, its files are damaged, or it has an adapter's configuration that zo_hf does
            not hand to PEFT.
    """
    prompt, prior = load_prompt(folder)
    if holds_adapter(folder):  # transformers gives PEFT the whole file
        read_adapter_config(folder)
    quantization = load_quantization(folder)
    more: dict[str, Any] = {}
    if quantization is not None:
        more = {"quantization_config": quantization, "device_map": "auto"}
    remedy = "name the output folder of a finished `zo-hf train`"
    tokenizer = loaded(f"the tokenizer in {folder}", lambda: AutoTokenizer.from_pretrained(folder), remedy)
    model = complete_model(
        f"the model in {folder}",
        lambda: AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more),
        remedy,
    )
    scores = label_scores(model, tokenizer, sentences, prompt)
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"the model in {folder} gives scores that are not finite, so its weights are broken; {remedy}."
        )
    if calibrate:
        scores = calibrated(scores, prior)
    probabilities, labels = scores.softmax(dim=-1).max(dim=-1)
    return [
        (prompt.verbalizers[label].strip(), probability)
        for label, probability in zip(labels.tolist(), probabilities.tolist(), strict=True)
    ]
