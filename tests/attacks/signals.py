"""Signals at any moment of a run: Ctrl-C between two lines, a checkpoint on SIGTERM, and processes that are killed.

An answer is right if the weights in memory are those after a whole number of steps, and if the run, resumed from what is on
the disk, ends with the bits of a run that nothing has stopped.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from tests.attacks.suite import Case
from tests.conftest import seeded, tiny_opt, weights_of
from tests.parallel.launch import Running
from tests.trainer.runs import At, make_trainer, trained, with_lora

SAMPLE = 6
STEPS = 5
SMALL = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 1}
COMMON: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-3, "zo_fold_steps": 2, "save_strategy": "steps"}
COMMON |= {"save_steps": 1, "logging_strategy": "no"}
KINDS: dict[str, dict[str, Any]] = {
    "low_rank": {},
    "low_rank, AdamW": {"optim": "adamw_torch", "weight_decay": 0.1},
    "low_rank, momentum": {"optim_args": "momentum=0.9"},
    "low_rank, normalized": {"zo_normalize": True, "learning_rate": 1e-4},
    "low_rank, bf16": {"dtype": torch.bfloat16},
    "low_rank, a direction for every row": {"zo_rows_per_direction": 1},
    "low_rank, adaptive layers": {"zo_direction": "adaptive_layers", "zo_active_layers": 0.5},
    "low_rank, accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "low_rank, only the log": {"save_only_trajectory": True},
    "full": {"zo_subspace": "full", "weight_decay": 0.1, "learning_rate": 1e-4},
    "adapter": {"zo_subspace": "adapter", "optim": "adamw_torch"},
    "core": {"zo_subspace": "core"},
    "hizoo": {"zo_rule": "hizoo", "zo_estimator": "second_difference"},
}
#: Functions whose lines are moments for an interrupt; the empty set stands for all functions of the package.
PLACES: dict[str, frozenset[str]] = {
    "the optimizer's step": frozenset(
        {"step", "apply_pending", "_single_tensor_sgd", "_single_tensor_adamw", "_advance"}
    ),
    "a fold": frozenset({"fold", "_fold_plain", "_fold_into", "_write", "draw_bases", "_remember_decay"}),
    "the end": frozenset({"finish", "_finish_zeroth_order", "detach", "_forget_engine"}),
    "a checkpoint": frozenset({"stage", "publish", "save", "save_engine", "_flush", "clear", "_save"}),
    "anywhere": frozenset(),
}
MOMENTS = 3


def _build(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    options = COMMON | KINDS[kind]
    model = seeded(tiny_opt, options.pop("dtype", torch.float32), **SMALL)
    return with_lora(model) if kind == "adapter" else model, options


@functools.cache
def _weights_after(kind: str) -> list[dict[str, Tensor]]:
    """The weights that runs of 0, 1 … `STEPS` steps end with."""
    model, options = _build(kind)
    found = [_plain(model)]
    note = At(None, lambda state, **more: found.append({k: t.float().clone() for k, t in model.state_dict().items()}))
    with tempfile.TemporaryDirectory() as folder:
        trained(folder, model, more={"callbacks": [note]}, **options | {"save_strategy": "no"})
    assert _same(found[-1], _plain(model)), "a run that ends at a step has other weights than a look at the step"
    return found


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """The weights, an adapter's in float32, which they are during a run and may not be before it."""
    return {name: tensor.float() for name, tensor in weights_of(model).items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _Traced:
    """Counts the lines of each place that Python is about to run, and sends SIGINT before one of them."""

    def __init__(self, place: str | None = None, at: int | None = None) -> None:
        self.place, self.at = place, at
        self.lines = dict.fromkeys(PLACES, 0)

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        own = "/zo_hf/" in code.co_filename
        if not own and "/torch/optim/" not in code.co_filename:
            return None
        wanted = [place for place, names in PLACES.items() if code.co_name in names or (own and not names)]
        return functools.partial(self._line, wanted) if wanted else None

    def _line(self, places: list[str], frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            for place in places:
                if place == self.place and self.lines[place] == self.at:
                    self.place = None
                    signal.raise_signal(signal.SIGINT)
                self.lines[place] += 1
        return functools.partial(self._line, places)

    @contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)


@functools.cache
def _lines(kind: str) -> dict[str, int]:
    """How many lines a whole run has in each place."""
    _weights_after(kind)  # a first run fills caches, by lines that later ones do not have
    model, options = _build(kind)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, model, **options)
        traced = _Traced()
        with traced.on():
            trainer.train()
    return traced.lines


def _resumed(folder: Path, kind: str) -> str | None:
    """Resume a stopped run; return what is wrong with its end."""
    model, options = _build(kind)
    resume = any(folder.glob("checkpoint-*/trainer_state.json")) or None
    trained(folder, model, resume=resume, **options)
    return None if _same(_plain(model), _weights_after(kind)[STEPS]) else "the resumed run ends with other weights"


def _interrupt(kind: str, place: str, share: float, folder: Path) -> str | None:
    lines = _lines(kind)[place]
    model, options = _build(kind)
    trainer = make_trainer(folder, model, **options)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = False
    try:
        with _Traced(place, int(share * lines)).on():
            trainer.train()
    except KeyboardInterrupt:
        stopped = True
    finally:
        signal.signal(signal.SIGINT, before)
    if not stopped and lines:
        return "the interrupt is lost"
    if any("forward" in module.__dict__ for module in model.modules()):
        return "the engine is left in the model"
    if not any(_same(_plain(trainer.model), weights) for weights in _weights_after(kind)):
        return "the weights in memory are not those after any number of steps"
    return _resumed(folder, kind)


class _Requested(JITCheckpointCallback):
    """Trainer's checkpoint on SIGTERM, as if the signal's time were up at a moment of a step."""

    def __init__(self, moment: str, step: int) -> None:
        super().__init__()
        self._moment, self._step = moment, step
        for name in ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_end"):
            setattr(self, name, functools.partial(self._at, name, getattr(super(), name)))

    def _at(self, name: str, act: Callable[..., Any], args: Any, state: Any, control: Any, **more: Any) -> Any:
        if name == self._moment and state.global_step == self._step and self.jit_manager is not None:
            self.jit_manager.is_checkpoint_requested = True
        return act(args, state, control, **more)


def _jit(kind: str, moment: str, folder: Path) -> str | None:
    model, options = _build(kind)
    options |= {"save_strategy": "no", "lr_scheduler_type": "linear"} if kind == "full" else {"save_strategy": "no"}
    callback = _Requested(moment, 3)
    trainer = make_trainer(folder, model, more={"callbacks": [callback]}, **options)
    callback.trainer, callback.jit_manager = trainer, CheckpointManager(trainer)
    trainer.train()
    saved = {path.name for path in folder.glob("checkpoint-*")}
    if len(saved) != 1:
        return f"there are the checkpoints {sorted(saved)}"
    model, _ = _build(kind)
    trained(folder, model, resume=True, **options)
    whole, _ = _build(kind)
    trained(folder / "whole", whole, **options)
    return None if _same(_plain(model), _plain(whole)) else "the resumed run ends with other weights"


_SCRIPT = """
import sys
import torch
from tests.attacks.signals import _build, _plain
from tests.trainer.runs import trained

folder, kind = sys.argv[1:]
from pathlib import Path
model, options = _build(kind)
resume = any(Path(folder).glob("checkpoint-*/trainer_state.json")) or None
print("started", flush=True)
trained(folder, model, resume=resume, **options | {"logging_strategy": "steps"})
torch.save(_plain(model), folder + "/final.pt")
"""


def _killed(kind: str, number: int, seed: int, folder: Path) -> str | None:
    """Stop a process by a signal at a random moment, twice, and let a third finish."""
    chance = random.Random(seed)
    script, run = folder / "run.py", folder / "run"
    script.write_text(_SCRIPT)
    for attempt in range(3):
        process = Running(script, folder / f"{attempt}.log", run, kind)
        while process.code is None and "started" not in process.said():
            time.sleep(0.01)
        if attempt < 2:
            time.sleep(chance.uniform(0, 0.8))
            if process.code is None:
                os.kill(process._process.pid or 0, number)
        process.wait(120)
        if (run / "final.pt").exists():
            break
    if not (run / "final.pt").exists():
        return f"the run does not end: {process.said().splitlines()[-1:]}"
    same = _same(torch.load(run / "final.pt"), _weights_after(kind)[STEPS])
    return None if same else "the resumed run ends with other weights"


def cases() -> list[Case]:
    """Return the table."""
    table = []
    for kind in KINDS:
        for place in PLACES:
            for number in range(MOMENTS):
                share = (number + random.Random(f"{kind} {place} {number}").random()) / MOMENTS
                run = functools.partial(_interrupt, kind, place, share)
                table.append(Case(f"Ctrl-C in {place}, {number + 1} of {MOMENTS}: {kind}", run))
        for moment in ("on_step_begin", "on_pre_optimizer_step", "on_step_end"):
            table.append(Case(f"SIGTERM's checkpoint at {moment}: {kind}", functools.partial(_jit, kind, moment)))
    for seed, kind in enumerate(("low_rank, AdamW", "full", "low_rank, a direction for every row")):
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            run = functools.partial(_killed, kind, number, seed)
            table.append(Case(f"a process ended twice by {number.name}: {kind}", run))
    return table
