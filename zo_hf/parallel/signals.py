"""Signals that wait until what is under way is whole, such as a step of the optimizer or a fold.

Python runs the handler of a signal between any two instructions. That of Ctrl-C raises KeyboardInterrupt, which in the middle
of a step leaves some weights before it and the others after it.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch.optim import Optimizer

#: The signals that end a process or ask it to end. A platform may lack some of them.
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if name in dir(signal))


@contextmanager
def whole() -> Iterator[None]:
    """Enter a context that a signal does not interrupt: its handler, if Python has one, runs when the context is left.

    Python runs handlers in the main thread alone, so the context does nothing in any other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: arrived.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


def make_steps_whole(optimizer: Optimizer) -> None:
    """Let signals wait until a step of the optimizer has ended, hooks included.

    Args:
        optimizer: an optimizer; its method `step` is replaced on the object, as schedules of torch do it, too.
    """
    step: Any = optimizer.step
    if "_is_whole" in vars(step):
        return
    function = getattr(step, "__func__", step)  # a schedule may have put a plain function there

    @functools.wraps(function)
    def whole_step(*args: Any, **kwargs: Any) -> Any:
        with whole():
            return function(*args, **kwargs)

    vars(whole_step)["_is_whole"] = True
    # A schedule that is made later asks for a bound method.
    made: Any = MethodType(whole_step, optimizer) if function is not step else whole_step
    optimizer.step = made  # type: ignore[method-assign]
