"""Command lines in which every option is spelled out, and given once, with a value."""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter, _AppendAction
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class CommandParser(ArgumentParser):
    """An ArgumentParser that refuses abbreviated, unknown and repeated options, and empty values, in one sentence.

    Unlike argparse's own, its description is shown as it is written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": RawDescriptionHelpFormatter, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as ArgumentParser does; a wrong command line ends the program with exit code 2."""
        words = sys.argv[1:] if args is None else list(args)
        wrong = what_is_wrong(words, self._option_string_actions)
        if wrong is not None:
            self.error(wrong)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2 and one sentence."""
        message = message.removeprefix("argument ")
        super().error(message if message.endswith(".") else f"{message}; --help describes the options.")


def what_is_wrong(words: Sequence[str], actions: dict[str, Action]) -> str | None:
    """Return the sentence that refuses a command line; None if its options are spelled out, given once and not empty.

    Args:
        words: the command line without the program's name.
        actions: the actions of a parser, by spelling of the option.
    """
    given: dict[str, str] = {}
    takes_value = None
    for word in words:
        if word == "--":
            break
        if not _is_option(word, actions):
            if word == "" and takes_value is not None:
                return f"{takes_value} has an empty value; give one, or leave the option out."
            takes_value = None
            continue
        name, equals, value = word.partition("=")
        if name not in actions:
            return f"there is no option {name}{_advice(name, actions)}."
        action = actions[name]
        if action.dest in given and not isinstance(action, _AppendAction):
            return f"{name} is given twice; give it once."
        given[action.dest] = name
        if equals and not value:
            return f"{name} has an empty value; give one, or leave the option out."
        takes_value = name if action.nargs != 0 and not equals else None
    return None


def _is_option(word: str, actions: dict[str, Action]) -> bool:
    """Return whether a word is an option rather than a value, as argparse decides it."""
    if not word.startswith("-") or word == "-":
        return False
    if word.partition("=")[0] in actions:
        return True
    try:
        float(word)
    except ValueError:
        return " " not in word
    return False


def _advice(name: str, actions: dict[str, Action]) -> str:
    longer = sorted((option for option in actions if option.startswith(name)), key=len)
    alike = longer or get_close_matches(name, actions, 1)
    if not alike:
        return "; --help lists the options"
    return f"; write {alike[0]} in full" if longer else f"; write {alike[0]} if you mean that"
