"""Processes that make runs, and an executor that needs none."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

import datasets
import torch
from transformers.utils import logging as transformers_logging


class InThisProcess(Executor):
    """An executor that runs a job at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def prepare_process() -> None:
    """Set up a process that makes runs: one thread, an end together with the parent process, and no bars and warnings."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Every run would warn anew, in the middle of the comparison's own bar.
    logging.getLogger("zo_hf").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def exit_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=exit_with_parent, daemon=True).start()


def executor_of(processes: int) -> Executor:
    """Return an executor of so many processes of one thread each; one is this process."""
    if processes == 1:
        prepare_process()
        return InThisProcess()
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=spawn, initializer=prepare_process)
