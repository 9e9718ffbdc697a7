"""Trajectory logs that somebody else has written: hostile headers, records, starting weights and adapter configurations.

An answer is right if the log is refused in one sentence that names the file, with every bit of the model as it was, or if
two replays of it give the same bits. Either way it takes little memory and time.
"""

from __future__ import annotations

import functools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tests.attacks.suite import Case
from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import trained, with_lora
from tests.trajectory.hostile import MUTATIONS, Parts, changed, damaged, parts_of
from tests.trajectory.hostile_files import BASES, CANARY, CONFIGS, STARTS
from zo_hf.cli.replay import summary
from zo_hf.parallel.checksum import tensors_hash
from zo_hf.trajectory import TrajectoryError, read_trajectory, replay, verify
from zo_hf.trajectory.base_model import load_base
from zo_hf.trajectory.log import MAGIC

SAMPLE = 30

MUTANTS, DAMAGES = 100, 20  # for every kind of run
SECONDS, MEMORY = 10.0, 256 << 20

SMALL = {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 1, "word_embed_proj_dim": 8, "vocab_size": 100}
ONE_STEP = {"max_steps": 4, "learning_rate": 1e-3, "zo_fold_steps": 2, "report_to": []}
RUNS: dict[str, dict[str, Any]] = {
    "low_rank": {"zo_rank": 2},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1, "zo_rank": 2},
    "momentum": {"optim_args": "momentum=0.9,nesterov=True"},
    "normalized": {"zo_normalize": True, "max_grad_norm": 1.0},
    "bf16": {"dtype": torch.bfloat16, "zo_rank": 2},
    "full": {"zo_subspace": "full", "weight_decay": 0.1},
    "full bf16": {"zo_subspace": "full", "dtype": torch.bfloat16, "zo_direction": "rademacher"},
    "sparse": {"zo_subspace": "full", "zo_direction": "sparse"},
    "core": {"zo_subspace": "core", "zo_rank": 2},
    "norms": {"zo_subspace": "norms"},
    "lora": {"zo_subspace": "adapter", "optim": "adamw_torch"},
    "lora bf16": {"zo_subspace": "adapter", "dtype": torch.bfloat16},
    "ia3": {"zo_subspace": "adapter"},
    "prefix": {"zo_subspace": "adapter"},
    "rows": {"zo_rows_per_direction": 2, "zo_direction": "rademacher"},
    "svrg": {"zo_rule": "svrg", "zo_svrg_batches": 1, "zo_svrg_steps": 1},
    "cocd": {"zo_rule": "cocd", "zo_estimator": "coordinate", "zo_num_directions": 2},
    "hizoo": {"zo_rule": "curvature", "zo_estimator": "second_difference"},
    "muon": {"zo_rule": "muon", "zo_momentum": 0.5},
    "mopi": {"zo_rule": "power_iteration", "zo_num_directions": 2},
    "conservative": {"zo_rule": "conservative"},
    "sign": {"zo_rule": "sign"},
    "orthogonal": {"zo_direction": "orthogonal", "zo_num_directions": 3},
    "adaptive layers": {"zo_direction": "adaptive_layers", "zo_subspace": "full"},
    "fzoo": {"zo_estimator": "fzoo", "zo_num_directions": 3},
    "evolution": {"zo_estimator": "evolution", "zo_num_directions": 3},
}


@dataclass(frozen=True)
class Recorded:
    """A run's log and the model that it begins at, which the cases share."""

    parts: Parts
    content: bytes
    files: dict[str, bytes]
    model: nn.Module
    weights: dict[str, torch.Tensor]

    def restore(self) -> None:
        """Bring the model back to the beginning of the run."""
        for name, parameter in self.model.named_parameters():
            parameter.data = self.weights[name].clone()
        for module in self.model.modules():
            assert not {"forward", "_old_forward"} & module.__dict__.keys(), "a hook is left"

    def state(self) -> str:
        """Identify every bit and dtype of the model, and what of it is trainable."""
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return tensors_hash(dict(self.model.named_parameters())) + ",".join(trainable)


def base(run: str) -> nn.Module:
    """The model that a run begins at."""
    import peft

    model = seeded(tiny_opt, RUNS[run].get("dtype", torch.float32), **SMALL)
    if run.startswith("lora"):
        return with_lora(model, r=2, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if run == "ia3":
            return peft.get_peft_model(
                model, peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
            )
        if run == "prefix":
            return peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    return model


@functools.cache
def recorded(run: str) -> Recorded:
    """Record a run of a few steps."""
    options = ONE_STEP | {name: value for name, value in RUNS[run].items() if name != "dtype"}
    with tempfile.TemporaryDirectory() as folder:
        trained(folder, base(run), **options)
        trajectory = read_trajectory(folder)
        files = {file.name: file.read_bytes() for file in trajectory.path.parent.iterdir()}
    model = base(run)
    weights = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    return Recorded(parts_of(trajectory), files["steps.zolog"], files, model, weights)


@contextmanager
def bounded() -> Any:
    """Bound the time, and where Linux tells the size of this process, the memory that it may take beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if (size := Path("/proc/self/statm")).exists():
        now = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    begin = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        if time.process_time() - begin > SECONDS:
            raise TimeoutError(f"took {time.process_time() - begin:.0f} seconds")


def is_sentence(error: BaseException, path: Path) -> str | None:
    """Say what is wrong with a refusal, if something is."""
    message = str(error)
    if not message.endswith(".") or "\n" in message or not message.isprintable():
        return f"not a sentence: {message[:200]!r}"
    if message.replace("e.g. ", "").count(". ") > 1 or len(message) > 1500:
        return f"more than two sentences: {message[:200]!r}"
    return None if str(path.parent) in message or path.name in message else f"names no file: {message[:200]!r}"


def answer(run: str, folder: Path, content: bytes, files: dict[str, bytes] | None = None) -> str | None:
    """Replay a log on the model of a run, and say what was wrong about it."""
    given = recorded(run)
    path = folder / "trajectory" / "steps.zolog"
    path.parent.mkdir()
    for name, data in (given.files | (files or {}) | {"steps.zolog": content}).items():
        (path.parent / name).write_bytes(data)
    before = given.state()
    results = []
    try:
        for _ in range(2):
            try:
                with bounded():
                    print(summary(verify(path)))
                    replay(given.model, path)
            except TrajectoryError as error:
                changed_bits = None if given.state() == before else "a refused log changed the model"
                return changed_bits or is_sentence(error, path)
            results.append(given.state())
            given.restore()
        return None if results[0] == results[1] else "two replays differ"
    finally:
        given.restore()


def original(run: str, folder: Path) -> str | None:
    """The log as it was written: it must not be refused."""
    given = recorded(run)
    if given.parts.signed() != given.content:
        return "the log cannot be put together again"
    before = given.state()
    path = folder / "steps.zolog"
    for name, data in given.files.items():
        (folder / name).write_bytes(data)
    replay(given.model, path)
    after = given.state()
    given.restore()
    return None if after != before else "nothing was replayed"


def mutant(run: str, number: int, folder: Path) -> str | None:
    """One to three mutations of a log, signed again."""
    source = random.Random(f"{run}/{number}")
    parts, done = recorded(run).parts, []
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        try:
            what, parts = source.choice(MUTATIONS)(parts, source)
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
        ):  # the header is no longer one to mutate
            break
        done.append(what)
    wrong = answer(run, folder, parts.signed())
    return wrong and f"{wrong} ({'; '.join(done)})"


def random_damage(run: str, number: int, folder: Path) -> str | None:
    """Random damage without new checksums."""
    what, content = damaged(recorded(run).content, random.Random(f"{run}/damage/{number}"))
    wrong = answer(run, folder, content)
    return wrong and f"{wrong} ({what})"


# Files that claim more than they hold.

LARGE: dict[str, Callable[[Parts], bytes]] = {
    "a header of 4 GB": lambda parts: MAGIC + b"\x01\x00" + b"\xff" * 4 + b"{}",
    "a million lists": lambda parts: Parts("[" + "[]," * 1_000_000 + "[]]", ()).signed(),
    "a million objects in a setting": lambda parts: changed(
        parts, lambda h: h["settings"].update(zo_rank=[{} for _ in range(300_000)])
    ).signed(),
    "a name of 8 MB": lambda parts: changed(parts, lambda h: h["groups"][0]["names"].append("x" * (8 << 20))).signed(),
    "many names": lambda parts: changed(
        parts, lambda h: h["groups"][0]["names"].extend(f"n{i}" for i in range(200_000))
    ).signed(),
    "many groups": lambda parts: changed(
        parts, lambda h: h.update(groups=[{"names": [], "options": {}}] * 60_000)
    ).signed(),
    "most numbers a step": lambda parts: changed(parts, lambda h: h.update(directions=1 << 16)).signed(),
    "most directions": lambda parts: changed(
        parts, lambda h: (h.update(directions=1 << 16), h["settings"].update(zo_num_directions=1 << 16))
    ).signed(),
    "a long snapshot": lambda parts: changed(
        parts, lambda h: h["settings"].update(zo_rule="svrg", zo_svrg_batches=1 << 30, zo_fold_steps=0)
    ).signed(),
    "orthogonal directions": lambda parts: Parts(
        changed(
            parts,
            lambda h: (
                h.update(directions=1 << 12),
                h["settings"].update(zo_num_directions=1 << 12, zo_direction="orthogonal"),
            ),
        ).header,
        (),
    ).signed(),
}


def large(name: str, folder: Path) -> str | None:
    """A small file that asks for much memory."""
    return answer("low_rank", folder, LARGE[name](recorded("low_rank").parts))


# The files beside a log.


def start(run: str, name: str, signed: bool, folder: Path) -> str | None:
    """Hostile starting weights, of which the header knows the hash if it is signed again."""
    given = recorded(run)
    content = STARTS[name](given.files["start.safetensors"])
    parts = given.parts
    if signed:
        path = folder / "a.safetensors"
        path.write_bytes(content)
        try:
            parts = changed(parts, lambda h: h.update(start=tensors_hash(load_file(path))))
        except Exception:  # no file of tensors
            signed = False
    return answer(run, folder, parts.signed(), {"start.safetensors": content})


def config(name: str, folder: Path) -> str | None:
    """Load a base model and wrap it with a hostile configuration, as `zo-hf replay` does, and replay the log."""
    given, content = recorded("lora"), CONFIGS[name]
    log, canary = folder / "trajectory" / "steps.zolog", folder / "canary"
    log.parent.mkdir()
    for file, data in given.files.items():
        (log.parent / file).write_bytes(data)
    text = json.dumps(content) if isinstance(content, dict) else content
    (log.parent / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    seeded(tiny_opt, **SMALL).save_pretrained(folder / "base")
    (folder / f"{CANARY}.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    sys.path.insert(0, str(folder))
    try:
        with bounded():
            replay(load_base(str(folder / "base"), read_trajectory(log)), log)
    except TrajectoryError as error:
        wrong = is_sentence(error, log)
    else:
        wrong = None if name in _HARMLESS else "accepted"
    finally:
        sys.path.remove(str(folder))
        imported = sys.modules.pop(CANARY, None)
    return "code ran" if canary.exists() or imported else wrong


#: They build the adapter of the run, without what they name.
_HARMLESS = {"auto mapping", "base of another", "runtime", "target parameters"}


def described(name: str, folder: Path) -> str | None:
    """Load the base model that a header describes, as `zo-hf replay` does, and replay the log."""
    given = recorded("low_rank")
    log = folder / "trajectory" / "steps.zolog"
    log.parent.mkdir()
    log.write_bytes(changed(given.parts, lambda h: h["base"].update(BASES[name])).signed())
    seeded(tiny_opt, **SMALL).save_pretrained(folder / "base")
    canary = folder / "canary"
    (folder / f"{CANARY}.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    sys.path.insert(0, str(folder))
    try:
        print(summary(verify(log)))
        replay(load_base(str(folder / "base"), read_trajectory(log)), log)
        wrong = None
    except TrajectoryError as error:
        wrong = is_sentence(error, log)
    finally:
        sys.path.remove(str(folder))
        imported = sys.modules.pop(CANARY, None)
    return "code ran" if canary.exists() or imported else wrong


def cases() -> list[Case]:
    """The whole table."""
    table: dict[str, Callable[[Path], str | None]] = {}
    for run in RUNS:
        table[f"{run}-original"] = functools.partial(original, run)
        for number in range(MUTANTS):
            table[f"{run}-mutant-{number}"] = functools.partial(mutant, run, number)
        for number in range(DAMAGES):
            table[f"{run}-damage-{number}"] = functools.partial(random_damage, run, number)
    table |= {f"large-{name}": functools.partial(large, name) for name in LARGE}
    for name in STARTS:
        for run in ("lora", "lora bf16", "prefix"):
            table[f"start-{run}-{name}"] = functools.partial(start, run, name, True)
        table[f"start-lora-{name}, unsigned"] = functools.partial(start, "lora", name, False)
    table |= {f"config-{name}": functools.partial(config, name) for name in CONFIGS}
    table |= {f"base-{name}": functools.partial(described, name) for name in BASES}
    return [Case(name, run) for name, run in table.items()]
