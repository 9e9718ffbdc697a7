"""The reason that another library gives for an error, in a form that fits into a sentence of ours."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the name of its class if it has none."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
