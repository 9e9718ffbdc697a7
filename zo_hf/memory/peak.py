"""Peak memory of a phase of a program, for comparing training with inference."""

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import torch

MIB = 2**20
SAMPLE_SECONDS = 0.02
#: Pages of this process, on Linux.
PAGES = Path("/proc/self/statm")


class PeakMemory:
    """Context manager that measures the peak memory while it is open.

    On CUDA this is the peak of memory that torch has allocated on the current device. Elsewhere it is the peak
    resident set size of the process, sampled by a thread, because the system's own peak cannot be reset between two
    phases.

        with PeakMemory() as inference:
            model(**batch)
        print(inference.mib)

    Attributes:
        mib: the peak in MiB; 0 until the context is closed.

    Raises:
        ValueError: nothing here tells the memory of the process.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            resident_bytes()  # refuses now, and not in the thread
        self.mib = 0.0
        self._peak_bytes = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_closed, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            self._peak_bytes = torch.cuda.max_memory_allocated()
        else:
            self._closed.set()
            self._thread.join()
        self.mib = self._peak_bytes / MIB

    def _sample_until_closed(self) -> None:
        closed = False
        while not closed:
            closed = self._closed.wait(SAMPLE_SECONDS)
            self._peak_bytes = max(self._peak_bytes, resident_bytes())


def resident_bytes() -> int:
    """Return the memory that this process holds now, in bytes: its resident set.

    Raises:
        ValueError: this system has no /proc, and psutil is not installed.
    """
    if PAGES.exists():
        return int(PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if find_spec("psutil") is None:
        raise ValueError(
            "the memory of a process is read by psutil on this system; install it with `pip install psutil`."
        )
    import psutil

    return int(psutil.Process().memory_info().rss)
