"""Label sentences with a model trained by `zo-hf train`.

The folder is a transformers checkpoint with a prompt.json. The command prints one line for each sentence: the most
probable label word, its probability among the label words, and the sentence.

    zo-hf predict out "a deep and moving film ." "an hour too long ."
"""

import argparse
from pathlib import Path

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
    from zo_hf.tasks.predicting import predict

    for sentence, (word, probability) in zip(
        args.sentences, predict(args.folder, args.sentences, args.calibrated), strict=True
    ):
        print(f"{shown(word)}\t{probability:.3f}\t{sentence}")
