"""Talk with a model trained by `zo-hf sft`.

The folder is a transformers checkpoint or a PEFT adapter, with a chat.json. Without --prompt, the command asks for one
message after another, and the model sees the whole conversation. Ctrl-D ends it. Text from a pipe is one message. A model
trained on plain text, without messages, continues the text that it gets.

    zo-hf chat out
    zo-hf chat out --prompt "How many minutes are 3 hours?"
    zo-hf chat out < question.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zo_hf.tasks.answering import Answering


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf chat`."""
    parser.add_argument("folder", type=Path, help="output folder of a training run")
    parser.add_argument("--prompt", metavar="TEXT", help="a single message; the command prints the answer and exits")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of tokens in an answer (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token each time (default); a higher value samples less probable ones more often",
    )


def run(args: argparse.Namespace) -> None:
    """Answer --prompt or what a pipe holds, else ask for messages.

    Raises:
        ValueError: an option has a wrong value, the folder holds no such model, or the message is empty or too long.
    """
    from zo_hf.tasks.answering import load_answering

    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1.")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(
            f"--temperature {args.temperature:g} must be a finite number of at least 0; 0 takes the most probable token."
        )
    text = args.prompt
    if text is None and not sys.stdin.isatty():
        try:
            text = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise ValueError("standard input is not text in UTF-8; give the message with --prompt.") from error
    if text is not None and not text.strip():
        raise ValueError("the message is empty; give one with --prompt, or through a pipe.")
    model = load_answering(args.folder, args.max_new_tokens, args.temperature)
    if text is not None:
        print(printable(model.answer([("user", text)])))
    else:
        converse(model)


def converse(model: Answering) -> None:
    """Ask for messages and answer them until the end of the input or Ctrl-C."""
    print("Write a message and press Enter; Ctrl-D ends.", flush=True)
    turns: list[tuple[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            continue
        turns = [*turns, ("user", text)] if model.is_chat else [("user", text)]
        while len(turns) > 1 and not model.fits(turns):
            turns = turns[2:]
            print("(the model forgets the oldest message and its answer, because it has no more positions)")
        try:
            answer = model.answer(turns)
        except KeyboardInterrupt:
            print()
            return
        except ValueError as error:
            print(error, flush=True)
            turns = turns[:-1]
            continue
        print(printable(answer), flush=True)
        turns.append(("assistant", answer))


def printable(text: str) -> str:
    """Return a text without the control characters that would change a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
