"""A lock on a run's folder: two runs in one folder would replace each other's log and checkpoints.

The lock is on an open file, so it goes when the process ends, however it ends.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from zo_hf.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

#: Times that a file is opened which another run removes meanwhile.
_ATTEMPTS = 16

FILE = "_running.lock"  # begins with _, which Trainer does not upload
#: The open files of this process. A child process must not keep them, and with them the lock, after this one has ended.
_held: set[int] = set()


@contextmanager
def locked(folder: Path, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Enter a context in which no other run writes to a folder; the first process holds the lock for all ranks.

    A folder that cannot be written to, or whose file system has no locks, is not locked.

    Args:
        folder: the run's folder; it is made if it does not exist.
        ranks: the processes that train together.
        device: device on which the ranks communicate.

    Raises:
        ValueError: another run has the lock; the message names the folder and the way out.
    """
    handle, owner = _acquire(folder / FILE) if ranks.grid.rank == 0 else (None, None)
    try:
        if not ranks.all_reduce_and(torch.tensor(owner is None, device=device)):
            raise ValueError(
                f"output_dir={str(folder)!r} is in use by another run{owner or ''}; wait for its end, or give this run an "
                "output_dir of its own."
            )
        yield
    finally:
        if handle is not None:
            _release(handle, folder / FILE)


def _acquire(path: Path) -> tuple[int | None, str | None]:
    """Return the open file that holds the lock, or None without one; and who has the lock, or None if nobody else has."""
    for _ in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            logger.debug("%s is not locked: %s", path.parent, error)
            return None, None
        _held.add(handle)
        try:
            _lock(handle)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            _close(handle)
            return None, f" ({owner})" if owner else ""
        except OSError as error:
            logger.debug("%s is not locked: %s", path.parent, error)
            _close(handle)
            return None, None
        if _is_there(handle, path):
            with suppress(OSError):  # a full disk has no room for the name of the owner
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle, None
        _close(handle)
    logger.debug("%s is not locked: its file does not stay the same", path.parent)
    return None, None


def _is_there(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at its path; another run may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _release(handle: int, path: Path) -> None:
    with suppress(OSError):  # Windows does not remove an open file
        path.unlink()
    _unlock(handle)
    _close(handle)


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _close_all() -> None:
    while _held:
        os.close(_held.pop())


try:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)

    os.register_at_fork(after_in_child=_close_all)
except ImportError:  # Windows
    import msvcrt

    #: Position of the byte that is locked: far behind the text, which others may then read.
    _BYTE = 1 << 20

    def _lock(handle: int) -> None:
        os.lseek(handle, _BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(handle, 0, os.SEEK_SET)

    def _unlock(handle: int) -> None:
        os.lseek(handle, _BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
