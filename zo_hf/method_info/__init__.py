"""Information that every method gives about itself: its row in `zo-hf methods`, and its options with their values."""

from zo_hf.method_info.method import Method, canonical_name
from zo_hf.method_info.option import Options, option
from zo_hf.method_info.values import (
    Choice,
    Flag,
    Name,
    OneOrMore,
    Pattern,
    Real,
    Texts,
    Values,
    Whole,
    checked,
    plain,
    shown,
)

__all__ = [
    "Choice",
    "Flag",
    "Method",
    "Name",
    "OneOrMore",
    "Options",
    "Pattern",
    "Real",
    "Texts",
    "Values",
    "Whole",
    "canonical_name",
    "checked",
    "option",
    "plain",
    "shown",
]
