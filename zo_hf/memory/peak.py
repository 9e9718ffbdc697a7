"""Peak memory of a phase of a program, for comparing training with inference."""

import threading
from types import TracebackType

import psutil
import torch

MIB = 2**20
SAMPLE_SECONDS = 0.02


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
    """

    def __init__(self) -> None:
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
        process = psutil.Process()
        closed = False
        while not closed:
            closed = self._closed.wait(SAMPLE_SECONDS)
            self._peak_bytes = max(self._peak_bytes, process.memory_info().rss)
