"""Checkpoints that lost a file or had one damaged, of every kind of run.

An answer is right if the checkpoint is refused by a sentence that names it, or passed over for the one before it, or if the
resumed run ends with the bits of a run that was never stopped.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.attacks.suite import Case
from tests.conftest import seeded, tiny_opt, weights_of
from tests.trainer.runs import At, trained, with_lora

SAMPLE = 8
SMALL = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 1}
COMMON: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-3, "zo_fold_steps": 3, "save_strategy": "steps"}
COMMON |= {"save_steps": 1, "logging_strategy": "no"}
KINDS: dict[str, dict[str, Any]] = {
    "low_rank": {"optim": "adamw_torch", "lr_scheduler_type": "linear"},
    "low_rank, hizoo": {"zo_rule": "hizoo", "zo_estimator": "second_difference"},
    "low_rank, only the log": {"save_only_trajectory": True},
    "full": {"zo_subspace": "full"},
    "full, only the log": {"zo_subspace": "full", "save_only_trajectory": True},
    "LoRA": {"zo_subspace": "adapter", "optim_args": "momentum=0.9"},
    "LoRA, only the log": {"zo_subspace": "adapter", "save_only_trajectory": True},
}
LAST = 4
_ALWAYS = ("scheduler.pt", "rng_state.pth", "trainer_state.json", "zo_state.json", "zo_manifest.json")
_LOG = (*_ALWAYS, "trajectory/steps.zolog")
_MODEL = (*_ALWAYS, "optimizer.pt", "training_args.bin", "model.safetensors", "config.json")
_FOLDED = (*_MODEL, "zo_coordinates.safetensors", "zo_base.safetensors")
_ADAPTER = (*_ALWAYS, "optimizer.pt", "training_args.bin", "adapter_model.safetensors", "adapter_config.json")
#: Files of the last checkpoint of each kind of run.
FILES: dict[str, tuple[str, ...]] = {
    "low_rank": _FOLDED,
    "low_rank, hizoo": (*_FOLDED, "zo_rule.safetensors"),
    "low_rank, only the log": _LOG,
    "full": _MODEL,
    "full, only the log": _LOG,
    "LoRA": (*_ADAPTER, "zo_coordinates.safetensors"),
    "LoRA, only the log": (*_LOG, "trajectory/start.safetensors", "trajectory/adapter_config.json"),
}
Harm = Callable[[Path, Path], None]


def _build(kind: str) -> nn.Module:
    model = seeded(tiny_opt, **SMALL)
    return with_lora(model) if kind.startswith("LoRA") else model


@functools.cache
def _whole(kind: str) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a run that was never stopped, without its last checkpoint, and the weights that it ended with."""
    folder = Path(tempfile.mkdtemp())
    model = _build(kind)
    trained(folder, model, **COMMON | KINDS[kind])
    shutil.rmtree(folder / f"checkpoint-{LAST + 1}")
    return folder, weights_of(model)


def _new_file(path: Path, content: bytes) -> None:
    path.unlink()  # it may share its content with another checkpoint
    path.write_bytes(content)


def missing(path: Path, other: Path) -> None:
    path.unlink()


def empty(path: Path, other: Path) -> None:
    _new_file(path, b"")


def half(path: Path, other: Path) -> None:
    content = path.read_bytes()
    _new_file(path, content[: len(content) // 2])


def one_bit(path: Path, other: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    _new_file(path, bytes(content))


def longer(path: Path, other: Path) -> None:
    _new_file(path, path.read_bytes() + b"\0")


def of_the_one_before(path: Path, other: Path) -> None:
    _new_file(path, other.read_bytes() if other.exists() else b"of no other")


def link_to_the_one_before(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def a_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS: dict[str, Harm] = {
    "missing": missing,
    "empty": empty,
    "cut to half": half,
    "with one bit changed near its beginning": functools.partial(one_bit, share=0.02),
    "with one bit changed in its middle": functools.partial(one_bit, share=0.5),
    "with one bit changed at its end": functools.partial(one_bit, share=1.0),
    "longer": longer,
    "of the checkpoint before": of_the_one_before,
    "a link to that of the checkpoint before": link_to_the_one_before,
    "a folder": a_folder,
}


def _same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    weights = weights_of(model)
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def _resume(kind: str, folder: Path, asked: bool | str, expected: dict[str, Tensor], may_refuse: bool) -> str | None:
    model = _build(kind)
    try:
        trained(folder, model, resume=asked, **COMMON | KINDS[kind])
    except ValueError as error:
        said = str(error)
        if not may_refuse:
            return f"it is refused: {said}"
        return (
            None if f"checkpoint-{LAST}" in said and "\n" not in said else f"the refusal names no checkpoint: {said}"
        )
    return None if _same(model, expected) else "the run ends with other weights"


def _harmed(kind: str, name: str, harm: Harm, asked: str, folder: Path) -> str | None:
    source, expected = _whole(kind)
    run = folder / "run"
    shutil.copytree(source, run)
    last = run / f"checkpoint-{LAST}"
    harm(last / name, run / f"checkpoint-{LAST - 1}" / name)
    return _resume(kind, run, True if asked == "the last" else str(last), expected, asked != "the last")


def _added(kind: str, names: dict[str, bytes], folder: Path) -> str | None:
    """Files that a callback adds after the save are no damage."""
    source, expected = _whole(kind)
    run = folder / "run"
    shutil.copytree(source, run)
    for name, content in names.items():
        (run / f"checkpoint-{LAST}" / name).parent.mkdir(exist_ok=True)
        (run / f"checkpoint-{LAST}" / name).write_bytes(content)
    return _resume(kind, run, str(run / f"checkpoint-{LAST}"), expected, False)


def _foreign_coordinates(kind: str, folder: Path) -> str | None:
    """At a fold there are no coordinates, and those of another step must not be read."""
    source, expected = _whole(kind)
    run = folder / "run"
    shutil.copytree(source, run)
    shutil.rmtree(run / f"checkpoint-{LAST}")
    target = run / "checkpoint-3"
    for name in ("zo_coordinates.safetensors", "zo_base.safetensors", "zo_rule.safetensors"):
        if (run / "checkpoint-2" / name).exists() and not (target / name).exists():
            shutil.copyfile(run / "checkpoint-2" / name, target / name)
    return _resume(kind, run, True, expected, False)


def _linked_folder(kind: str, number: int, limit: int | None, folder: Path) -> str | None:
    """A checkpoint's name that is a link: nothing behind it is written or removed."""
    source, expected = _whole(kind)
    run, elsewhere = folder / "run", folder / "elsewhere"
    shutil.copytree(source, run)
    if (run / f"checkpoint-{number}").exists():
        os.replace(run / f"checkpoint-{number}", elsewhere)
    else:
        shutil.copytree(run / f"checkpoint-{LAST}", elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    (run / f"checkpoint-{number}").symlink_to(elsewhere)
    model = _build(kind)
    options = COMMON | KINDS[kind] | {"save_total_limit": limit}
    trained(run, model, resume=str(run / "checkpoint-2"), **options)
    after = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    if before != after:
        return "what the link leads to has changed"
    return None if _same(model, expected) else "the run ends with other weights"


def _damaged_base_in_the_run(kind: str, folder: Path) -> str | None:
    """The base file that the next checkpoint would share is damaged while the run goes on."""
    run = folder / "run"

    def harm(state: Any, **more: Any) -> None:
        path = run / "checkpoint-1" / "zo_base.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 4
        path.write_bytes(content)

    options = COMMON | KINDS[kind]
    _, expected = _whole(kind)
    trained(run, _build(kind), more={"callbacks": [At({2}, harm)]}, **options)
    for number in (3, 4, 5):
        shutil.rmtree(run / f"checkpoint-{number}")
    model = _build(kind)
    trained(run, model, resume=True, **options)
    return None if _same(model, expected) else "the run ends with other weights"


def cases() -> list[Case]:
    """Return the table."""
    table = []
    for kind in KINDS:
        for name in FILES[kind]:
            for number, (how, harm) in enumerate(HARMS.items()):
                asked = ("the last", "that one")[(number + len(name)) % 2]
                run = functools.partial(_harmed, kind, name, harm, asked)
                table.append(Case(f"{name} {how}, asked for {asked}: {kind}", run))
        more = {"README.md": b"a card", "notes/metrics.json": b"{}", "pytorch_lora_weights.bin": b"x"}
        table.append(Case(f"files added after the save: {kind}", functools.partial(_added, kind, more)))
        for number, limit in ((1, 2), (3, None), (LAST, None), (LAST + 1, None), (LAST + 1, 1)):
            name = f"checkpoint-{number} is a link, save_total_limit={limit}: {kind}"
            table.append(Case(name, functools.partial(_linked_folder, kind, number, limit)))
    for kind in ("low_rank", "low_rank, hizoo"):
        table.append(
            Case(f"files of another step beside a fold: {kind}", functools.partial(_foreign_coordinates, kind))
        )
        table.append(Case(f"the base damaged in the run: {kind}", functools.partial(_damaged_base_in_the_run, kind)))
    return table
