"""Label sentences with a model trained by `zo-hf train`.

The folder is a transformers checkpoint with a prompt.json. The command prints one line for each sentence: the most
probable label word, its probability among the label words, and the sentence.

    zo-hf predict out "a deep and moving film ." "an hour too long ."
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf.checkpoint import holds_adapter
from zo_hf.subspaces.adapter_config import read_adapter_config
from zo_hf.tasks.classify import calibrated, label_scores
from zo_hf.tasks.loading import complete_model, loaded
from zo_hf.tasks.saved_prompt import load_prompt, load_quantization
from zo_hf.untrusted.fields import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf predict`."""
    parser.add_argument("folder", type=Path, help="output folder of a training run")
    parser.add_argument("sentences", nargs="+", metavar="sentence", help="a sentence to label")
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="subtract the labels' scores on texts without content; this helps a model with little or no training",
    )


def run(args: argparse.Namespace) -> None:
    """Print the label of each sentence."""
    for sentence, (word, probability) in zip(
        args.sentences, predict(args.folder, args.sentences, args.calibrated), strict=True
    ):
        print(f"{shown(word)}\t{probability:.3f}\t{sentence}")


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
