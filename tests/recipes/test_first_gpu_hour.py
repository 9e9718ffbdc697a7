"""The report of the run on a GPU has every part: those that passed, those that failed and those for which no time was left."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.recipe_module import recipe_module
from zo_hf.cli import bench, bench_steps

recipe: Any = recipe_module("first_gpu_hour")


@pytest.mark.parametrize(("device", "small"), [("cuda", False), ("cpu", True)])
def test_every_benchmark_is_one_that_the_command_takes(device: str, small: bool) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    parts = [part for part in recipe.parts(device, small) if part.name.startswith("bench")]
    assert len(parts) == (1 if small else 7)
    for part in parts:
        args = parser.parse_args([word for word in part.arguments[3:] if word not in ("--output", "{output}")])
        assert set(args.variants or ()) <= set(bench_steps.variants(args))
        assert args.device == device and args.shape in bench_steps.SHAPES


def test_a_part_that_fails_or_takes_too_long_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    result = "import json, sys; json.dump({'forward': {'launches': 3, 'waits': 1}}, open(sys.argv[1], 'w'))"
    parts = [
        recipe.Part("launches", ("-c", result, "{output}"), 60),
        recipe.Part("demo", ("-c", "print('so far'); raise SystemExit('no good')"), 60),
        recipe.Part("bench slow", ("-c", "import time; time.sleep(60)"), 0.5),
    ]
    run = recipe.run_all(parts, "cpu", 120.0, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == run
    assert [part["status"] for part in run["parts"].values()] == ["passed", "failed", "stopped after 0 s"]
    table = (tmp_path / "gpu.md").read_text()
    assert "| forward | 3 | 1 |" in table
    assert "no good\nso far" in table
    late = recipe.run_all(parts, "cpu", 0.0, tmp_path / "late.json")
    assert {part["status"] for part in late["parts"].values()} == {"no time left"}


def test_a_part_leaves_no_process_and_half_a_file_or_other_bytes_are_no_error(tmp_path: Path) -> None:
    child = "import time; time.sleep(120)"
    begin = (
        "import subprocess, sys; from pathlib import Path; sys.stdout.buffer.write(b'\\xff so far\\n'); "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]); Path(sys.argv[2]).write_text(str(child.pid)); "
        "Path(sys.argv[1]).write_text('{'); sys.stdout.flush()"
    )
    pid = tmp_path / "pid"
    part = recipe.run_part(recipe.Part("bench", ("-c", begin, "{output}", str(pid)), 60), tmp_path, 60.0)
    assert part["status"] == "passed" and part["results"] is None
    assert part["end"] == ["\ufffd so far"]
    assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    """Return whether a process has not ended within a minute; one that nobody has waited for has."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_launches_are_counted() -> None:
    counts = recipe.count_launches("cpu", True)
    assert counts["step"]["launches"] > counts["forward"]["launches"] > 20
