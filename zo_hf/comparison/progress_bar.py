"""The progress bar of a comparison: which runs are under way, and how long all of them will take.

The bar counts forward passes of a batch, those for scores included, because runs differ in length. Learning rates beyond
the number that was asked for cannot be foreseen. They make the bar longer when they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from zo_hf.comparison.job import Job, titles
from zo_hf.comparison.schedule import Comparison


class ProgressBar:
    """A context manager with a bar on stderr, to be told of the start and the end of every run.

    Args:
        comparisons: the comparisons whose runs are made.
    """

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        self.comparisons = comparisons
        problems = [comparison.problem for comparison in comparisons]
        self._titles = dict(zip(problems, titles(problems), strict=True))
        made, left = self._passes()
        self.bar = tqdm(total=made + left, initial=made, unit="pass", smoothing=0)
        self._running: list[str] = []

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def starts(self, comparison: Comparison, job: Job) -> None:
        """Name a run that starts."""
        self._running.append(self._words(comparison, job))
        self._show()

    def done(self, comparison: Comparison, job: Job) -> None:
        """Count a run that is finished, or has failed."""
        self._running.remove(self._words(comparison, job))
        made, left = self._passes()
        self.bar.total = made + left
        self.bar.update(made - self.bar.n)
        self._show()

    def _show(self) -> None:
        more = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
        self.bar.set_description_str(self._running[0] + more if self._running else "")

    def _passes(self) -> tuple[int, int]:
        each = [comparison.passes() for comparison in self.comparisons]
        return sum(made for made, _ in each), sum(left for _, left in each)

    def _words(self, comparison: Comparison, job: Job) -> str:
        title = self._titles[comparison.problem]
        if not job.budget:
            return f"{title}: untrained, seed {job.seed}"
        kind = f"seed {job.seed}" if job.evaluations else "trial"
        return f"{title}: {job.method}, {kind}, {job.learning_rate:.2g}"
