"""A signal waits until what is under way is whole."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR

from zo_hf.parallel.signals import make_steps_whole, whole


def test_the_handler_runs_once_when_the_outermost_context_is_left() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        with whole():
            with whole():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("not reached")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_passes_and_the_handlers_are_back() -> None:
    with pytest.raises(ZeroDivisionError), whole():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_waits_as_well() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with whole():
            signal.raise_signal(signal.SIGTERM)
            assert not seen
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_is_not_disturbed() -> None:
    entered: list[Any] = []

    def enter() -> None:
        with whole():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]


@pytest.mark.parametrize("schedule", ["none", "before", "after"])
def test_a_step_and_its_hooks_are_taken_whole(schedule: str) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if schedule == "before":
        ConstantLR(optimizer, 1.0)
    ended: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    optimizer.register_step_post_hook(lambda *_: ended.append(True))
    make_steps_whole(optimizer)
    make_steps_whole(optimizer)
    if schedule == "after":
        ConstantLR(optimizer, 1.0)
    weight.grad = torch.ones(2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert ended == [True] and weight.tolist() == [-1.0, -1.0]
