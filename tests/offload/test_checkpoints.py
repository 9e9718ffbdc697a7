"""Checkpoints of a model whose weights are on the disk: written whole, read back into place, and resumed bit for bit."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, causal_batch, weights_of
from tests.offload.models import as_arrays, in_memory, on_disk, saved, values_of
from tests.offload.test_training import RUN, lora
from tests.parallel.launch import Running
from tests.trainer.runs import SaveAt, logged, make_trainer, trained
from zo_hf.offload import OffloadedWeight, get_peft_model, whole_state_dict
from zo_hf.trajectory import replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_has_the_files_of_one_in_memory_and_resumes_with_the_same_bits(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """At a fold, and between two, from the disk and into it, and from memory."""
    base, more = saved(tmp_path / "base", dtype=dtype), {"callbacks": [SaveAt(3, 5)]}
    plain = trained(tmp_path / "plain", in_memory(base), more=more, **RUN)
    whole = trained(tmp_path / "whole", on_disk(base), more=more, **RUN)
    assert_same_bits(values_of(whole.model), weights_of(plain.model))
    for step in (3, 5):
        folders = [tmp_path / run / f"checkpoint-{step}" for run in ("plain", "whole")]
        names = {path.name for path in folders[0].glob("*.safetensors")}
        assert names == {path.name for path in folders[1].glob("*.safetensors")}
        assert ("zo_base.safetensors" in names) == (step == 5)
        for name in names:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
        for folder in folders:
            resumed = trained(
                tmp_path / "resumed" / folder.parent.name / str(step), on_disk(base), resume=str(folder), **RUN
            )
            assert logged(resumed, "loss")[step:] == logged(plain, "loss")[step:]
            assert_same_bits(values_of(resumed.model), weights_of(plain.model))


def prompt(model: nn.Module, wrap: Any) -> nn.Module:
    from peft import PromptTuningConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return wrap(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("adapter", [lora, prompt])
def test_an_adapter_resumes(tmp_path: Path, adapter: Any) -> None:
    base = saved(tmp_path / "base")
    more = {"callbacks": [SaveAt(5)]}
    whole = trained(tmp_path / "whole", adapter(on_disk(base), get_peft_model), more=more, **RUN)
    resumed = trained(
        tmp_path / "resumed",
        adapter(on_disk(base), get_peft_model),
        resume=str(tmp_path / "whole" / "checkpoint-5"),
        **RUN,
    )
    assert_same_bits(whole_state_dict(resumed.model), whole_state_dict(whole.model))


def test_the_log_replays_on_the_disk_and_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    trainer = trained(tmp_path / "run", on_disk(base), save_strategy="steps", save_steps=8, **RUN)
    caplog.clear()  # what the run has said, if another test lets it speak
    with caplog.at_level(logging.WARNING, "zo_hf"):
        used = on_disk(base)
        with torch.no_grad():
            used(**causal_batch())  # accelerate has replaced its parameters, and untied them
        for model in (used, in_memory(base)):
            assert_same_bits(values_of(replay(model, tmp_path / "run")), values_of(trainer.model))
    assert not [record for record in caplog.records if record.name.startswith("zo_hf")]


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "load_best_model_at_end": True}
    ends = [
        trained(tmp_path / way.__name__, way(base), metric_for_best_model="loss", **RUN | options)
        for way in (in_memory, on_disk)
    ]
    assert_same_bits(values_of(ends[1].model), weights_of(ends[0].model))
    assert ends[1].evaluate()["eval_loss"] == min(logged(ends[1], "eval_loss"))


class DiskFails(OSError):
    pass


def fail_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Let one write of a weight fail, counted from 1."""
    count, real = [0], OffloadedWeight.write

    def counted(self: OffloadedWeight, value: torch.Tensor) -> None:
        count[0] += 1
        if count[0] == write:
            raise DiskFails("the disk fails")
        real(self, value)

    monkeypatch.setattr(OffloadedWeight, "write", counted)


def test_a_fold_that_a_failing_disk_has_ended_is_finished_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No block is folded twice: the model is that of a run which ends at the fold."""
    base = saved(tmp_path / "base", num_hidden_layers=3)
    plain = trained(tmp_path / "plain", in_memory(base), **RUN | {"max_steps": 3})
    trainer = make_trainer(tmp_path / "failed", on_disk(base), **RUN)
    fail_at(monkeypatch, 20)
    with pytest.raises(DiskFails):
        trainer.train()
    assert_same_bits(values_of(trainer.model), weights_of(plain.model))


def test_a_run_that_died_in_a_fold_is_resumed_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's files are the base that they were, although half of a fold had been written."""
    base = saved(tmp_path / "base", num_hidden_layers=3)
    whole = trained(tmp_path / "whole", in_memory(base), **RUN)
    model = as_arrays(base)
    files = {path: path.read_bytes() for path in (tmp_path / "arrays").iterdir()}
    trainer = make_trainer(tmp_path / "run", model, more={"callbacks": [SaveAt(5)]}, **RUN)
    with monkeypatch.context() as patch:
        fail_at(patch, 72)
        patch.setattr(type(trainer), "_finish_zeroth_order", lambda self: None)  # a killed process finishes nothing
        with pytest.raises(DiskFails):
            trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "arrays").iterdir()} == files
    resumed = trained(tmp_path / "run", as_arrays(base), resume=True, **RUN)
    assert_same_bits(values_of(resumed.model), weights_of(whole.model))


KILLED_IN_A_FOLD = """
import os, signal, sys
from pathlib import Path
from tests.offload.models import on_disk
from tests.offload.test_training import RUN
from tests.trainer.runs import SaveAt, trained
from zo_hf.offload import OffloadedWeight

real, written = OffloadedWeight.write, []

def write(self, value):
    written.append(self)
    if len(written) == 60:  # the second fold has begun
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, value)

OffloadedWeight.write = write
trained(sys.argv[2], on_disk(Path(sys.argv[1])), more={"callbacks": [SaveAt(5)]}, **RUN)
"""


@pytest.mark.slow
def test_a_process_killed_in_a_fold_leaves_no_file_and_resumes(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    whole = trained(tmp_path / "whole", in_memory(base), **RUN)
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_A_FOLD)
    process = Running(script, tmp_path / "killed.log", base, tmp_path / "run")
    assert process.wait(300) == -signal.SIGKILL, process.said()
    assert not list((tmp_path / "offload").iterdir())
    resumed = trained(tmp_path / "run", on_disk(base), resume=True, **RUN)
    assert_same_bits(values_of(resumed.model), weights_of(whole.model))
