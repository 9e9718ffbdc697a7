"""Commands whose output breaks, whose output path cannot be written, or that are interrupted.

Right is: the work is done and saved whatever happens to its output; a place that cannot be written is refused before the
work, in one sentence that names the option; Ctrl-C is one sentence that says what was kept. No case shows a traceback.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.attacks.suite import Case
from tests.parallel.launch import ROOT, Running

SAMPLE = 2

LIMIT = 120  # seconds of a case

SCRIPT = """
import io, json, os, signal, sys, resource
from importlib import import_module

argv, kind, moment, entry = json.loads(sys.argv[1])

def direct(number, place, mode="w", **options):
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT) if isinstance(place, str) else place
    os.dup2(descriptor, number)
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), **{"encoding": "utf-8"} | options)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], stream)

def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer

numbers = {"stdout": [1], "stderr": [2], "both": [1, 2]}[kind.partition("-")[0]]
for number in numbers:
    what = kind.partition("-")[2]
    if what == "pipe":
        direct(number, broken_pipe())
    elif what == "full":
        direct(number, "/dev/full")
    elif what == "closed":
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
    elif what in ("ascii", "latin-1"):
        # As PYTHONIOENCODING makes them.
        direct(number, os.dup(number), encoding=what, errors="strict" if number == 1 else "backslashreplace")
    elif what == "small-disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

from zo_hf.cli import bench
bench.measure_memory = lambda args, name: 1.0  # a process of its own, which takes seconds

if moment:
    module, *path = moment.split(":")
    owner = import_module(module)
    *owners, name = path
    for one in owners:
        owner = getattr(owner, one)
    stock = getattr(owner, name)
    calls = []
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 or name != "training_step":
            os.kill(os.getpid(), signal.SIGINT)
        return stock(*args, **kwargs)
    setattr(owner, name, interrupted)

sys.argv = ["zo-hf", *argv]
if entry == "zo-hf":
    from zo_hf.cli.main import main
    main(argv)
else:
    import runpy
    sys.path.insert(0, os.path.dirname(entry))  # as Python does for a script
    runpy.run_path(entry, run_name="__main__")
"""


@functools.cache
def given() -> Path:
    """Return a folder with a model, sentences, and the output of a short run, made once."""
    from safetensors.torch import load_file

    from tests.conftest import seeded, tiny_llama, tiny_opt
    from tests.tasks.conftest import make_tokenizer
    from tests.trainer.runs import trained
    from zo_hf.tasks.prompts import PROMPT_A
    from zo_hf.tasks.saved_prompt import save_prompt

    folder = Path(tempfile.mkdtemp(prefix="printing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = make_tokenizer()
    model = seeded(tiny_llama, vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    import torch

    save_prompt(folder / "model", PROMPT_A, torch.tensor([0.5, 0.5]).log())
    rows = [f"film {i} is {'great' if i % 2 else 'dull'},{i % 2}" for i in range(40)]
    (folder / "films.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    seeded(tiny_opt).save_pretrained(folder / "base")
    seeded(tiny_opt, seed=1).save_pretrained(folder / "other")
    from transformers import AutoModelForCausalLM

    trained(folder / "run", AutoModelForCausalLM.from_pretrained(folder / "base"), max_steps=20)
    assert load_file(folder / "base" / "model.safetensors")
    (folder / "config.json").write_text((folder / "base" / "config.json").read_text())
    return folder


def job(*more: str) -> list[str]:
    """Return the options of the job on the given sentences."""
    place = given()
    options = {"model_name_or_path": place / "model", "train_file": place / "films.csv", "text_column": "review"}
    options |= {"label_column": "stars", "per_device_train_batch_size": 4, "eval_steps": 2, "logging_steps": 1}
    options |= {"num_progress_examples": 6, "use_cpu": True}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + [*more]


def train(output: object, *more: str) -> list[str]:
    """Return the command line of a training of four steps."""
    return ["train", *job("--max_steps", "4", "--output_dir", str(output), *more)]


def find_lr(output: object) -> list[str]:
    """Return the command line of a search."""
    return ["find-lr", *job("--max_steps", "220", "--output_dir", str(output))]


def bench(output: object) -> list[str]:
    """Return the command line of a small benchmark."""
    words = ["--shape", "tiny", "--rounds", "1", "--rows", "2", "--length", "8", "--variants", "low_rank"]
    return ["bench", *words, "--output", str(output)]


def replay(output: object, *more: str) -> list[str]:
    """Return the command line of a replay of the given run."""
    return ["replay", str(given() / "run"), "--model", str(given() / "base"), "--output", str(output), *more]


FLEET = str(ROOT / "recipes" / "fleet_simulation.py")


#: What happens to the output.
KINDS = (
    *("stdout-pipe", "stdout-full", "stdout-closed", "stdout-ascii", "stdout-latin-1"),
    *("stderr-pipe", "stderr-full", "stderr-closed", "both-ascii", "both-pipe", "both-full", "both-closed"),
)


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        argv: makes its command line from the folder of the case.
        leaves: files that it writes there.
        entry: "zo-hf", or the path of a script.
        kinds: what happens to its output.
    """

    argv: Callable[[Path], list[str]]
    leaves: Sequence[str] = ()
    entry: str = "zo-hf"
    kinds: Sequence[str] = KINDS


COMMANDS = {
    "help": Command(lambda folder: ["--help"]),
    "train-help": Command(lambda folder: ["train", "--help"]),
    "plan-help": Command(lambda folder: ["plan", "--help"]),
    "methods": Command(lambda folder: ["methods"]),
    "methods-json": Command(lambda folder: ["methods", "--format", "json"]),
    "plan": Command(
        lambda folder: ["plan", str(given() / "config.json"), "--gpu-memory", "1GB", "--sequence-length", "32"],
        kinds=("stdout-pipe", "stdout-full", "both-ascii"),  # it takes many seconds
    ),
    "predict": Command(lambda folder: ["predict", str(given() / "model"), "un film très beau — ½ ★ 好", "dull ."]),
    "verify": Command(lambda folder: ["replay", str(given() / "run"), "--verify"]),
    "replay": Command(lambda folder: replay(folder / "tuned"), ["tuned/model.safetensors"]),
    "bench": Command(lambda folder: bench(folder / "figures.json"), ["figures.json", "figures.png"]),
    "find-lr": Command(lambda folder: find_lr(folder / "out"), ["out/learning_rate.png"]),
    "train": Command(
        lambda folder: train(folder / "out"),
        [f"out/{name}" for name in ("model.safetensors", "metrics.json", "run.png")],
    ),
    "fleet": Command(
        lambda folder: ["--workers", "10", "--output", str(folder / "fleet.json")], ["fleet.json", "fleet.png"], FLEET
    ),
}
#: Exit codes by what happens to the output; 0 for all others.
CODES = {"stdout-pipe": 141, "both-pipe": 141, "stdout-full": 1, "both-full": 1}


def started(
    folder: Path, argv: list[str], kind: str = "stdout-", moment: str = "", entry: str = "zo-hf"
) -> tuple[int, str]:
    """Run a command in a process of its own; return its exit code and what it said."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    plan = json.dumps([argv, kind, moment, entry])
    running = Running(script, folder / "said.log", plan, MPLBACKEND="Agg")
    return running.wait(LIMIT), running.said()


def _ugly(said: str) -> str | None:
    bad = next((word for word in ("Traceback", "Exception ignored", "Logging error") if word in said), None)
    return None if bad is None else f"{bad}: {said.strip().splitlines()[-1]}"


def breaks(name: str, kind: str, folder: Path) -> str | None:
    """Judge a command whose output breaks."""
    command = COMMANDS[name]
    code, said = started(folder, command.argv(folder), kind, entry=command.entry)
    missing = [file for file in command.leaves if not (folder / file).is_file()]
    if missing:
        return f"it wrote no {missing} (exit code {code}): {said.strip().splitlines()[-1:]}"
    if code != CODES.get(kind, 0):
        return f"exit code {code}: {said.strip().splitlines()[-1:]}"
    if "ascii" in kind and "both" in kind and not said.isascii():
        return f"not ASCII: {[line for line in said.splitlines() if not line.isascii()][:1]}"
    return _ugly(said)


def interrupted(argv: Callable[[Path], list[str]], moment: str, kept: str, folder: Path) -> str | None:
    """Judge a command that is interrupted at a moment."""
    code, said = started(folder, argv(folder), moment=moment)
    lines = [line for line in said.splitlines() if line.startswith("interrupted: ")]
    if code != 130 or len(lines) != 1 or kept not in lines[0]:
        return f"exit code {code}: {said.strip().splitlines()[-1:]}"
    return _ugly(said)


def refused(argv: Callable[[Path], list[str]], words: str, folder: Path, entry: str = "zo-hf") -> str | None:
    """Judge a command that must be refused before its work."""
    code, said = started(folder, argv(folder), entry=entry)
    lines = [line for line in said.splitlines() if "error: " in line]
    if code != 2 or len(lines) != 1 or not re.search(words, lines[0]) or not lines[0].endswith("."):
        return f"exit code {code}: {lines or said.strip().splitlines()[-1:]}"
    worked = next(
        (word for word in ("zero-shot", "ms/step", "replayed", "learning rate ", "seconds") if word in said), None
    )
    return _ugly(said) if worked is None else f"it worked first: {worked}"


def works(argv: Callable[[Path], list[str]], leaves: str, folder: Path, entry: str = "zo-hf") -> str | None:
    """Judge a command that must do its work."""
    code, said = started(folder, argv(folder), entry=entry)
    return None if code == 0 and (folder / leaves).is_file() else f"exit code {code}: {said.strip().splitlines()[-1:]}"


def full_disk(argv: Callable[[Path], list[str]], folder: Path) -> str | None:
    """Judge a command whose disk is full when it saves."""
    code, said = started(folder, argv(folder), "stdout-small-disk")
    lines = [line for line in said.splitlines() if "error: " in line]
    if code != 1 or len(lines) != 1 or "File too large" not in lines[0]:
        return f"exit code {code}: {lines or said.strip().splitlines()[-1:]}"
    return _ugly(said)


def in_a_shell(line: str, codes: tuple[int, ...], folder: Path) -> str | None:
    """Judge a command line of bash; its exit code is that of the pipe's first command."""
    python = f"{sys.executable} -m zo_hf.cli.main"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = line.replace("zo-hf", python).replace("GIVEN", str(given()))
    done = subprocess.run(
        ["bash", "-c", line + "; exit ${PIPESTATUS[0]}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=LIMIT,
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    return (
        _ugly(said) if done.returncode in codes else f"exit code {done.returncode}: {said.strip().splitlines()[-1:]}"
    )


def _file(folder: Path, name: str = "file") -> Path:
    path = folder / name
    path.write_text("kept")
    return path


def _folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def _places() -> dict[str, Callable[[Path], str | None]]:
    """Return output paths of every command that has one."""
    table: dict[str, Callable[[Path], str | None]] = {}
    folders = {"train": (train, "--output_dir"), "find-lr": (find_lr, "--output_dir"), "replay": (replay, "--output")}
    leaves = {"train": "metrics.json", "find-lr": "learning_rate.png", "replay": "model.safetensors"}
    for name, (make, option) in folders.items():
        bad: dict[str, Callable[[Path], object]] = {
            "a-file": lambda folder: _file(folder),
            "below-a-file": lambda folder: _file(folder) / "out",
            "far-below-a-file": lambda folder: _file(folder) / "a" / "out",
            "nowhere": lambda folder: "/proc/nowhere/out",
            "read-only": lambda folder: "/proc",
            "a-device": lambda folder: "/dev/full",
        }
        for place, path in bad.items():
            argv = functools.partial(lambda make, path, folder: make(path(folder)), make, path)
            table[f"{name}-to-{place}"] = functools.partial(refused, argv, option)
        argv = functools.partial(lambda make, folder: make(folder / "a" / "b" / "c"), make)
        table[f"{name}-to-missing-parents"] = functools.partial(works, argv, f"a/b/c/{leaves[name]}")
    table["train-over-a-folder"] = functools.partial(
        refused, lambda folder: train(_folder(folder, "out/metrics.json").parent), "metrics.json is a folder"
    )
    files: dict[str, Callable[[Path], object]] = {
        "a-folder": lambda folder: _folder(folder, "figures"),
        "below-a-file": lambda folder: _file(folder) / "figures.json",
        "nowhere": lambda folder: "/proc/nowhere/figures.json",
        "read-only": lambda folder: "/proc/figures.json",
        "a-full-device": lambda folder: "/dev/full",
    }
    for place, path in files.items():
        table[f"bench-to-{place}"] = functools.partial(
            refused, functools.partial(lambda p, f: bench(p(f)), path), "--output"
        )
        argv = functools.partial(lambda p, f: ["--workers", "10", "--output", str(p(f))], path)
        table[f"fleet-to-{place}"] = functools.partial(refused, argv, "--output", entry=FLEET)
    table["bench-to-a-png"] = functools.partial(refused, lambda folder: bench(folder / "figures.png"), "for JSON")
    table["bench-to-missing-parents"] = functools.partial(works, lambda folder: bench(folder / "a/b.json"), "a/b.json")
    for recipe in ("cocd_digits", "find_lr_against_grid", "edge_of_stability", "auto_rate_on_small_tasks"):
        entry = str(ROOT / "recipes" / f"{recipe}.py")
        argv = lambda folder: ["--output", str(_file(folder) / "out")]  # noqa: E731
        table[f"{recipe}-below-a-file"] = functools.partial(refused, argv, "--(output|figures)", entry=entry)
    for name, make in (("train", train), ("replay", replay)):
        table[f"{name}-to-a-full-disk"] = functools.partial(
            full_disk, functools.partial(lambda make, folder: make(folder / "out"), make)
        )
    return table


def _replays() -> dict[str, Callable[[Path], str | None]]:
    """Return replays of something that is not there, or into something that must stay."""

    def argv(*words: str) -> Callable[[Path], list[str]]:
        def made(folder: Path) -> list[str]:
            places = {"GIVEN": str(given()), "HERE": str(folder)}
            return ["replay", *(re.sub("GIVEN|HERE", lambda found: places[found[0]], word) for word in words)]

        return made

    base, out = ("--model", "GIVEN/base"), ("--output", "HERE/tuned")
    wrong = {
        "until-beyond": ((*base, *out, "--until", "999"), "until=999"),
        "until-one-beyond": ((*base, *out, "--until", "21"), "until=21"),
        "until-negative": ((*base, *out, "--until", "-1"), "until=-1"),
        "verify-until-beyond": (("--verify", "--until", "999"), "until=999"),
        "verify-until-negative": (("--verify", "--until", "-5"), "until=-5"),
        "verify-base-until-beyond": ((*base, "--verify", "--until", "21"), "until=21"),
        "into-the-base": ((*base, "--output", "GIVEN/base"), "base model's own folder"),
        "into-the-base-by-another-path": ((*base, "--output", "GIVEN/run/../base/."), "base model's own folder"),
        "into-the-run": ((*base, "--output", "GIVEN/run"), "folder of the run"),
        "into-the-log": ((*base, "--output", "GIVEN/run/trajectory"), "folder of the run"),
        "other-base": (("--model", "GIVEN/other", *out), "was recorded from"),
        "other-architecture": (("--model", "GIVEN/model", *out), "was recorded from|could not be|no weights"),
        "no-base": (("--model", "HERE/nothing", *out), "nothing"),
        "base-without-weights": (("--model", "GIVEN", *out), "error"),
    }
    table: dict[str, Callable[[Path], str | None]] = {
        f"replay-{name}": functools.partial(refused, argv("GIVEN/run", *words), says)
        for name, (words, says) in wrong.items()
    }
    table["replay-no-log"] = functools.partial(refused, argv("HERE/nothing", *base, *out), "does not exist")
    table["replay-a-model-as-log"] = functools.partial(refused, argv("GIVEN/base", *base, *out), "holds no trajectory")
    for until in ("0", "7", "20"):
        words = argv("GIVEN/run", *base, *out, "--until", until)
        table[f"replay-until-{until}"] = functools.partial(works, words, "tuned/model.safetensors")
    return table


def _interruptions() -> dict[str, Callable[[Path], str | None]]:
    saves = ("--save_strategy", "steps", "--save_steps", "2")
    job_module, trainer = "zo_hf.tasks.sentiment_job", "zo_hf.trainer.trainer:ZOTrainer"
    table: dict[str, tuple[Callable[[Path], list[str]], str, str]] = {
        "methods": (COMMANDS["methods"].argv, "zo_hf.cli.method_tables:kinds", "nothing was saved"),
        "plan": (COMMANDS["plan"].argv, "zo_hf.cli.plan:plan", "nothing was saved"),
        "predict": (COMMANDS["predict"].argv, "zo_hf.tasks.predicting:label_scores", "nothing was saved"),
        "verify": (COMMANDS["verify"].argv, "zo_hf.trajectory:verify", "nothing was saved"),
        "replay": (COMMANDS["replay"].argv, "zo_hf.trajectory:replay", "nothing was saved"),
        "bench": (COMMANDS["bench"].argv, "zo_hf.cli.bench:measure_time", "nothing was saved"),
        "find-lr": (COMMANDS["find-lr"].argv, f"{trainer}:find_learning_rate", "nothing was saved"),
        "train-loading": (COMMANDS["train"].argv, f"{job_module}:load_model", "no checkpoint was kept"),
        "train-before": (COMMANDS["train"].argv, f"{job_module}:evaluate", "no checkpoint was kept"),
        "train": (COMMANDS["train"].argv, f"{trainer}:training_step", "no checkpoint was kept"),
        "train-with-checkpoints": (
            lambda folder: train(folder / "out", *saves),
            f"{trainer}:training_step",
            "checkpoint-2 is kept",
        ),
        "train-at-the-plot": (COMMANDS["train"].argv, f"{job_module}:plot_run", "the trained model is saved in"),
    }
    return {f"interrupted-{name}": functools.partial(interrupted, *row) for name, row in table.items()}


def _shells() -> dict[str, Callable[[Path], str | None]]:
    """Return real command lines, whose end is that of a whole Python."""
    run = "zo-hf replay GIVEN/run --verify"
    lines = {
        "head": ("zo-hf methods | head -1", (0, 141)),
        "head-of-help": ("zo-hf --help | head -1", (0, 141)),
        "head-of-nothing": ("zo-hf methods | true", (0, 141)),
        "full": ("zo-hf methods > /dev/full", (1,)),
        "full-help": ("zo-hf --help > /dev/full", (1,)),
        "closed": ("zo-hf methods >&-", (0,)),
        "closed-errors": (f"{run} 2>&-", (0,)),
        "all-closed": (f"{run} <&- >&- 2>&-", (0,)),
        "ascii": ("PYTHONIOENCODING=ascii zo-hf plan --help", (0,)),
        "c-locale": ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 zo-hf plan --help", (0,)),
    }
    return {f"shell-{name}": functools.partial(in_a_shell, *row) for name, row in lines.items()}


def cases() -> list[Case]:
    """Return the whole table."""
    table = {
        f"{name}-{kind}": functools.partial(breaks, name, kind) for name, one in COMMANDS.items() for kind in one.kinds
    }
    table |= _places() | _replays() | _interruptions() | _shells()
    return [Case(name, run) for name, run in table.items()]
