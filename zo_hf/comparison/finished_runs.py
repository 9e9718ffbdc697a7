"""A file of finished runs, from which an interrupted comparison continues."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_hf.trainer.output_paths import check_file
from zo_hf.untrusted import plain_json


class FinishedRuns:
    """A file of finished runs, one line of JSON each, from which an interrupted comparison continues.

    Args:
        path: the file; its folder is created.
        settings: the names of the settings that identify a run.
        only_read: True if no run will be added.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: Path, settings: Sequence[str], only_read: bool = False) -> None:
        self._path, self._settings = path, tuple(settings)
        if not only_read:
            check_file("--output", path)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text and not only_read:  # the process was killed while it wrote a line
            path.write_text(complete, encoding="utf-8")
        self._runs = {self._key(run): run for run in runs_in(complete, path, settings)}

    def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the finished run with these settings, or None."""
        return self._runs.get(self._key(settings))

    def found_or_made(self, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the finished run with these settings; without one, make it, and add it.

        Args:
            settings: the settings of the run.
            make: makes the run, and returns its results.
        """
        run = self.find(settings)
        if run is None:
            run = {**settings, **make()}
            self.add(run)
        return run

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run, which holds its settings and its results."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self._runs[self._key(run)] = run

    def _key(self, run: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in self._settings)


def runs_in(text: str, path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs in a text, one line of JSON each.

    Args:
        text: the content of `path`.
        path: the file, for the error.
        names: names that every run has, with a plain value.

    Raises:
        ValueError: a line is no such run.
    """
    try:
        # Losses may not be finite, and Python writes them as they are.
        runs = [plain_json.parse(line.encode(), finite=False) for line in text.splitlines()]
        for run in runs:
            hash(tuple(run[name] for name in names))
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} holds lines that no comparison writes; move it away to start anew.") from error
    return runs


def finished_runs_are_kept() -> str:
    """Return what an interrupted comparison has left behind."""
    return "the finished runs are kept, and the same command continues with the next"
