"""Starting several processes that train as one, without a launcher that would hide how each of them ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(script: Path, world_size: int, *arguments: object, **environment: str) -> list[subprocess.Popen]:
    """Start `world_size` processes of a Python script; each writes what it says to a file beside the script.

    The script finds its rank in RANK, as under torchrun, and `environment` beside it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(world_size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    processes = []
    for rank in range(world_size):
        with log_of(script, rank).open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", str(script), *map(str, arguments)],
                    cwd=ROOT,
                    env=os.environ | common | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[int]:
    """Exit codes of the processes; whatever still runs after `seconds` is killed, and its code is -SIGKILL."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return [process.returncode for process in processes]


def log_of(script: Path, rank: int) -> Path:
    """What a process has said."""
    return script.with_name(f"{script.stem}-{rank}.log")


def run(script: Path, world_size: int, *arguments: object, seconds: float = 240, **environment: str) -> None:
    """Start the processes, wait for all, and fail with what they said unless all ended well."""
    codes = finish(start(script, world_size, *arguments, **environment), seconds)
    said = "\n".join(log_of(script, rank).read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{said}"
