"""Errors of a server that evaluates the model."""

from __future__ import annotations


class ServingError(RuntimeError):
    """Raised if the servers cannot evaluate the model; the message names the server and the way out."""


class ServerGone(ServingError):
    """Raised if a server stays away; the work goes on if there is another one."""


class ServerLost(Exception):
    """Raised if a server gives no answer, because it is gone or busy; its work can go on when it is back."""


class BadAnswer(Exception):
    """Raised if a server fails at a request, or its answer is not what was asked for; it may succeed the next time."""
