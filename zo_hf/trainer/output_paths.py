"""Trying the places that a run will write to, before there is any work to lose."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def check_folder(option: str, folder: str | Path, *names: str) -> None:
    """Make a folder, and try to write in it.

    Args:
        option: the option that names the folder, for the message.
        folder: the folder; missing parents are made.
        names: files that will be written there.

    Raises:
        ValueError: nothing can be written there; the message gives the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        for name in names:
            check_file(option, folder / name)
    except FileExistsError as error:
        raise ValueError(f"{option} {folder} is a file; name a folder.") from error
    except OSError as error:
        raise _refusal(option, folder, error, "folder") from error


def check_file(option: str, path: str | Path) -> None:
    """Try to write a file, and leave it as it is.

    Args:
        option: the option that names the file, for the message.
        path: the file; missing parents are made.

    Raises:
        ValueError: nothing can be written there; the message gives the reason.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; name a file.")
        if not path.name or str(path).endswith(os.sep):
            raise ValueError(f"{option} {str(path)!r} is not a file name; name a file.")
        existed = os.path.lexists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            # A device such as /dev/full tells only when something is written to it.
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.write(b"\n")
        if not existed:
            path.unlink()
    except FileExistsError as error:
        raise ValueError(f"{option} {path} is below a file; name a file in a folder.") from error
    except OSError as error:
        raise _refusal(option, path, error, "file") from error


def _refusal(option: str, path: Path, error: OSError, kind: str) -> ValueError:
    return ValueError(f"{option} {path} cannot be written ({error.strerror}); name a {kind} that can.")
