"""The benchmark measures what it says, on a model small enough for a test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_same_bits, weights_of
from zo_hf.cli import bench, bench_steps


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--shape", "tiny", "--rounds", "1", "--rows", "2", "--length", "8", *words])


def test_the_table_and_the_files_hold_every_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_memory", lambda args, name: 1.0 + len(name))
    bench.run(options("--variants", "low_rank", "--output", str(tmp_path / "figures.json")))
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["variant"] for row in figures["rows"]] == ["forward", "low_rank"]
    assert [row["noise_percent"] is None for row in figures["rows"]] == [True, False]
    assert all(row["milliseconds"] > 0 and row["peak_mib"] == 1.0 + len(row["variant"]) for row in figures["rows"])
    assert "low_rank" in printed and (tmp_path / "figures.png").stat().st_size > 0


def test_the_memory_of_a_variant_is_that_of_a_process_of_its_own() -> None:
    assert bench.measure_memory(options(), "low_rank") > 0


@pytest.mark.parametrize("name", [name for name in bench_steps.VARIANTS if name != "forward"])
def test_every_variant_takes_a_real_step_and_leaves_the_model_to_the_next(name: str) -> None:
    model, batch = bench_steps.build(options())
    before = weights_of(model)
    step = bench_steps.VARIANTS[name](model, batch)
    with step.attached():
        for _ in range(51 if "low_rank" in name else 2):  # which writes the weights when it folds
            step()
    assert not any("forward" in module.__dict__ for module in model.modules())
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert not changed if name == "adapter" else len(changed) > 10  # an adapter moves, on a copy of the model


@pytest.mark.parametrize("name", ["low_rank-rows", "full-gaussian"])
def test_the_noise_is_the_time_in_which_directions_are_drawn(name: str) -> None:
    """Those of two rows together, in the time that a clock of calls shows; `full` draws a module's part at a time."""
    model, batch = bench_steps.build(options())
    step, ticks = bench_steps.VARIANTS[name](model, batch), iter(range(10**6))
    with step.attached():
        step()
    drawn: list[int] = []
    draws = {key: getattr(step.distribution, key) for key in ("draw_layouts", "draw_slice", "draw_rows")}
    for key, draw in draws.items():
        setattr(step.distribution, key, lambda *args, draw=draw: (drawn.append(1), draw(*args))[1])
    share = bench.noise_share(step, lambda: next(ticks))
    assert share == pytest.approx(len(drawn) / (2 * len(drawn) + 1))
    assert len(drawn) == 1 if "rows" in name else len(drawn) > 10


def test_the_bare_forward_changes_nothing() -> None:
    model, batch = bench_steps.build(options())
    before = weights_of(model)
    bench_steps.VARIANTS["forward"](model, batch)()
    assert_same_bits(weights_of(model), before)


def test_a_wrong_option_is_answered_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"--rounds"):
        bench.run(options("--rounds", "0"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device cuda is not available"):
            bench.run(options("--device", "cuda"))
