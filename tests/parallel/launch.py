"""Starting several processes that train as one, without a launcher that would hide how each of them ends."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.parallel.preloaded"])


class Running:
    """A process of its own that runs a Python script; what it prints goes to a file.

    Args:
        script: the script, which sees `arguments` in sys.argv and `environment` in os.environ.
        log: the file.
    """

    def __init__(self, script: Path, log: Path, *arguments: object, **environment: str) -> None:
        self.log = log
        log.unlink(missing_ok=True)
        common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with mock.patch.dict(os.environ, common):
            forkserver.ensure_running()  # it reads PYTHONPATH, but not the sys.path of this process
            whole = dict(os.environ) | environment
        self._process = FORKS.Process(target=_run, args=(script, log, [*map(str, arguments)], whole))
        self._process.start()

    @property
    def code(self) -> int | None:
        """The exit code, -SIGKILL after a kill; None while it runs."""
        return self._process.exitcode

    def said(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, seconds: float) -> int:
        """Return the exit code; kill the process if it still runs after `seconds`."""
        self._process.join(max(0.1, seconds))
        if self.code is None:
            self.kill()
            self._process.join()
        assert self.code is not None
        return self.code


def _run(script: Path, log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def start(script: Path, world_size: int, *arguments: object, **environment: str) -> list[Running]:
    """Start `world_size` processes of a Python script; each writes what it says to a file beside the script.

    The script finds its rank in RANK, as under torchrun, and `environment` beside it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    processes = []
    for rank in range(world_size):
        of_rank = common | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(Running(script, log_of(script, rank), *arguments, **of_rank))
    return processes


def finish(processes: list[Running], seconds: float = 240) -> list[int]:
    """Exit codes of the processes; whatever still runs after `seconds` is killed, and its code is -SIGKILL."""
    deadline = time.monotonic() + seconds
    return [process.wait(deadline - time.monotonic()) for process in processes]


def log_of(script: Path, rank: int) -> Path:
    """What a process has said."""
    return script.with_name(f"{script.stem}-{rank}.log")


def run(script: Path, world_size: int, *arguments: object, seconds: float = 240, **environment: str) -> None:
    """Start the processes, wait for all, and fail with what they said unless all ended well."""
    codes = finish(start(script, world_size, *arguments, **environment), seconds)
    said = "\n".join(log_of(script, rank).read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{said}"
