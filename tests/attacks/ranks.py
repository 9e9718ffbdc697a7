"""Two processes that were started differently, or of which one changes its weights, stops, dies, raises or runs out of memory.

Right is: every process ends soon, with a code that is not 0, one sentence that names what differs or who is lost, and
nothing saved. Where the difference does no harm, right is a run that ends well.
"""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.attacks.suite import Case
from tests.parallel.launch import finish, log_of, start

SAMPLE = 2

#: Seconds that a process may wait for another, and that a whole case may take.
TIMEOUT, LIMIT = 6, 60

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from tests.conftest import TinyTask, seeded, tiny_gpt2, tiny_opt
from tests.trainer.runs import At, config, make_trainer, with_lora

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
own = json.loads(sys.argv[2])
plan = own["all"] | own["ranks"].get(str(rank), {})
options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ddp_timeout": TIMEOUT, "per_device_train_batch_size": 4}
options |= plan.get("options", {})
options.setdefault("eval_strategy", "no")
model = {"opt": tiny_opt, "gpt2": tiny_gpt2}[plan.get("model", "opt")]
model = seeded(model, seed=plan.get("model_seed", 0), dtype=getattr(torch, plan.get("dtype", "float32")), **plan.get("size", {}))
if "lora" in plan:
    model = with_lora(model, r=plan["lora"])
for name, parameter in model.named_parameters():
    if plan.get("frozen") and plan["frozen"] in name:
        parameter.requires_grad_(False)
more = {"train_dataset": TinyTask(plan.get("rows", 64)), "eval_dataset": TinyTask(plan.get("eval_rows", 16))}
if "optimizer" in plan:
    kind, given = plan["optimizer"]
    kind = getattr(torch.optim, kind)
    more["optimizers"] = (kind([p for p in model.parameters() if p.requires_grad], **given), None)


def happen(*_, **__):
    what = plan.get("happens")
    if what is None:
        return
    print("HAPPENS", flush=True)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "interrupt":
        raise KeyboardInterrupt
    elif what == "exit":
        sys.exit(0)
    elif what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    elif what == "end":
        trainer.control.should_training_stop = True
    elif what in ("weight", "coordinate"):
        name = plan["tensor"]
        tensors = dict(trainer.model.named_parameters()) if what == "weight" else trainer.zo.subspace.coordinates
        with torch.no_grad():
            tensors[name].view(-1)[3] += 1.0
    else:
        raise RuntimeError("something of the user's own")


if plan.get("where") == "start":
    config(folder / "first", **options)  # which meets the other processes
    happen()
trainer = make_trainer(folder / plan.get("out", "out"), model, more=more, **options)
step = plan.get("step", 2)
if plan.get("where") == "loss":
    stock = trainer.compute_loss
    def compute_loss(*args, **kwargs):
        if trainer.state.global_step >= step:
            happen()
        return stock(*args, **kwargs)
    trainer.compute_loss = compute_loss
elif plan.get("where") == "callback":
    trainer.add_callback(At({step}, happen))
elif plan.get("where") in ("on_save", "on_evaluate", "on_train_begin", "on_log", "on_train_end"):
    callback = At(set(), None)
    setattr(callback, plan["where"], happen)
    trainer.add_callback(callback)
elif plan.get("where") == "data":
    stock = trainer.data_collator
    trainer.data_collator = lambda rows: happen() or stock(rows)
trainer.train(resume_from_checkpoint=plan.get("resume"))
trainer.save_model(str(folder / f"final-{rank}"))
print("DONE", flush=True)
""".replace("TIMEOUT", str(TIMEOUT))


@dataclass(frozen=True)
class Attack:
    """One start of two processes or more.

    Args:
        ranks: what each rank does otherwise than all, by rank.
        all: what all ranks do.
        answer: judges the end: codes, what each rank said, and the folder.
        world_size: number of processes.
    """

    ranks: Mapping[int, Mapping[str, Any]]
    answer: Callable[[list[int], list[str], Path], str | None]
    all: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 2

    def __call__(self, folder: Path) -> str | None:
        script = folder / "run.py"
        script.write_text(SCRIPT)
        plan = json.dumps({"all": self.all, "ranks": self.ranks})
        processes = start(script, self.world_size, folder, plan)
        stopped = [rank for rank, own in self.ranks.items() if own.get("happens") == "stop"]
        finish([process for rank, process in enumerate(processes) if rank not in stopped], LIMIT)
        for rank in stopped:
            processes[rank].kill()
        codes = finish(processes, 1)
        return self.answer(
            codes, [log_of(script, rank).read_text(errors="replace") for rank in range(self.world_size)], folder
        )


def _saved(folder: Path) -> list[str]:
    found = [*folder.glob("out*/checkpoint-*/trainer_state.json"), *folder.glob("final-*/*")]
    return [str(path.relative_to(folder)) for path in found]


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def refused(names: list[str], codes: list[int], said: list[str], folder: Path, saved: bool = False) -> str | None:
    """Judge a run that every rank must end with the same sentence, which has all `names`."""
    if any(code != 1 for code in codes):
        return f"exit codes {codes}"
    lines = [_last_line(one) for one in said]
    if len(set(lines)) > 1:
        return f"not the same sentence: {lines}"
    missing = [name for name in names if name not in lines[0]]
    if missing:
        return f"no {missing} in {lines[0]!r}"
    if _saved(folder) and not saved:
        return f"saved {_saved(folder)}"
    return None


def disagrees(*names: str) -> Callable[[list[int], list[str], Path], str | None]:
    """Judge a run whose ranks were started differently."""
    return partial(refused, ["the processes of this run disagree", *names])


def differs(*names: str, saved: bool = False) -> Callable[[list[int], list[str], Path], str | None]:
    """Judge a run whose weights became different; `saved` if a checkpoint was written before."""
    return partial(refused, ["differs from the rest", *names], saved=saved)


def ends_well(codes: list[int], said: list[str], folder: Path) -> str | None:
    """Judge a run with a difference that does no harm."""
    return (
        None
        if not any(codes) and all("DONE" in one for one in said)
        else f"exit codes {codes}: {list(map(_last_line, said))}"
    )


def names_lost(*lost: int, own: int | None = None) -> Callable[[list[int], list[str], Path], str | None]:
    """Judge a run that has lost ranks: the others name them; `own` is the exit code of those that are lost."""

    def judge(codes: list[int], said: list[str], folder: Path) -> str | None:
        for rank, (code, one) in enumerate(zip(codes, said, strict=True)):
            if rank in lost:
                if own is not None and code != own:
                    return f"rank {rank} ended with {code}"
            elif code != 1:
                return f"exit codes {codes}"
            elif f"the process of rank {', '.join(map(str, lost))} of this run has stopped" not in _last_line(one):
                return f"rank {rank} said {_last_line(one)!r}"
        if list(folder.glob("final-*/*")):
            return f"saved {_saved(folder)}"
        return None

    return judge


def ends_badly(codes: list[int], said: list[str], folder: Path) -> str | None:
    """Judge a run that every rank must end with an error, each in words of its own."""
    return None if all(codes) and -signal.SIGKILL not in codes else f"exit codes {codes}"


def says(text: str) -> Callable[[list[int], list[str], Path], str | None]:
    """Judge a run that every rank refuses by itself."""
    return partial(refused, [text])


#: Another value for one rank of each argument that must agree, and options of all that make it valid.
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 2.0,
    "max_steps": 5,
    "learning_rate": 0.02,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 2,
    "optim": "adamw_torch",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "logging_strategy": "no",
    "logging_steps": 2,
    "logging_first_step": True,
    "include_num_input_tokens_seen": "all",
    "eval_strategy": "steps",
    "eval_delay": 1,
    "eval_on_start": True,
    "eval_accumulation_steps": 1,
    "prediction_loss_only": True,
    "batch_eval_metrics": True,
    "save_strategy": "no",
    "save_steps": 2,
    "save_only_model": True,
    "ignore_data_skip": True,
    "seed": 7,
    "data_seed": 7,
    "accelerator_config": {"split_batches": True},
    "dataloader_drop_last": True,
    "remove_unused_columns": False,
    "train_sampling_strategy": "sequential",
    "save_only_trajectory": True,
    "zo_subspace": "full",
    "zo_rank": 2,
    "zo_fold_steps": 2,
    "zo_eps": 1e-4,
    "zo_estimator": "one_sided",
    "zo_num_directions": 2,
    "zo_rows_per_direction": 0,
    "zo_noise_scale_steps": 5,
    "zo_direction": "rademacher",
    "zo_rule": "sign",
    "zo_momentum": 0.5,
    "zo_max_projected_grad": 1.0,
    "zo_normalize": True,
    "zo_batched_probes": False,
    "zo_common_random_numbers": False,
    "zo_kernels": "torch",
    "zo_target_modules": ".*fc1.*",
    "zo_exclude_modules": ".*fc1.*",
    "zo_max_forward_passes": 10,
    "zo_max_time": 100.0,
    "zo_parallel": "both",
    "zo_check_steps": 2,
    "zo_stability_steps": 2,
}
#: Options of all ranks that an argument needs.
TOGETHER: dict[str, dict[str, Any]] = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "optim_args": {"optim": "sgd"},
    "zo_momentum": {"zo_rule": "muon", "zo_num_directions": 2},
    "zo_estimator": {"zo_rows_per_direction": 0},
    "zo_num_directions": {"zo_rows_per_direction": 0},
    "zo_stability_steps": {"zo_rows_per_direction": 0},
    "zo_noise_scale_steps": {"zo_rows_per_direction": 0},
    "save_only_trajectory": {"zo_rows_per_direction": 0},
}
#: Arguments that need not agree.
HARMLESS: dict[str, Any] = {
    "output_dir": None,
    "run_name": "another",
    "disable_tqdm": False,
    "log_level": "error",
    "log_level_replica": "error",
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "save_total_limit": 1,
    "ddp_timeout": 30,
    "torch_empty_cache_steps": 2,
    "skip_memory_metrics": False,
}
WEIGHT, COORDINATE = "model.decoder.layers.1.fc1.weight", "model.decoder.layers.0.self_attn.k_proj.weight"
FROZEN = {"zo_target_modules": ".*layers[.]0[.].*", "zo_fold_steps": 0}


MANY = """
import json, os, sys
from pathlib import Path
from tests.trainer.runs import make_trainer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
said = {}
for name, value, shared in json.loads(sys.argv[2]):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4} | shared
    try:
        make_trainer(folder / "out", **options | ({name: value} if rank == 1 else {})).train()
        said[name] = "trained"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
(folder / f"said-{rank}.json").write_text(json.dumps(said))
"""
GROUP = 12


@functools.cache
def _said(group: int) -> list[dict[str, str]]:
    """Return what each rank answers to each argument of a group, which one pair of processes tries in turn."""
    names = list(ARGUMENTS)[group * GROUP : (group + 1) * GROUP]
    with TemporaryDirectory() as place:
        folder = Path(place)
        script = folder / "run.py"
        script.write_text(MANY)
        plan = [(name, ARGUMENTS[name], TOGETHER.get(name, {})) for name in names]
        finish(start(script, 2, folder, json.dumps(plan)), 2 * LIMIT)
        return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]


def _argument(name: str, folder: Path) -> str | None:
    """Judge the answer to an argument that has another value on one rank."""
    first, second = (said.get(name, "") for said in _said(list(ARGUMENTS).index(name) // GROUP))
    if first != second:
        return f"not the same sentence: {first!r}, {second!r}"
    right = first.startswith("ReplicasDiffer: the processes of this run disagree") and f"{name} is " in first
    return None if right else f"it said {first!r}"


def _arguments() -> dict[str, Callable[[Path], str | None]]:
    table: dict[str, Callable[[Path], str | None]] = {}
    for name in ARGUMENTS:
        table[f"argument-{name}"] = partial(_argument, name)
    for name, value in HARMLESS.items():
        own = {"out": "out-of-its-own"} if name == "output_dir" else {"options": {name: value}}
        table[f"harmless-{name}"] = Attack({1: own}, ends_well)
    for name in ("seed", "learning_rate", "optim", "max_steps"):  # exit codes and files, in processes of their own
        table[f"run-{name}"] = Attack(
            {1: {"options": {name: ARGUMENTS[name]}}}, disagrees(name, "on rank 0", "on rank 1")
        )
    return table


def _starts() -> dict[str, Attack]:
    adamw = ["AdamW", {"lr": 1e-3}]
    return {
        "rows": Attack({1: {"rows": 60}}, disagrees("the length of train_dataset is 64 on rank 0 and 60 on rank 1")),
        "rows-of-the-first": Attack({0: {"rows": 8}}, disagrees("the length of train_dataset")),
        "eval-rows": Attack({1: {"eval_rows": 12}}, disagrees("the length of eval_dataset")),
        "wider-model": Attack({1: {"size": {"ffn_dim": 96}}}, disagrees("fc1.weight")),
        "deeper-model": Attack({1: {"size": {"num_hidden_layers": 3}}}, disagrees("model.decoder.layers.2")),
        "other-model": Attack({1: {"model": "gpt2"}}, disagrees("the weight")),
        "other-dtype": Attack({1: {"dtype": "bfloat16"}}, disagrees("torch.float32", "torch.bfloat16")),
        "frozen-on-one": Attack({1: {"frozen": "fc1"}}, disagrees("fc1.weight", "trained")),
        "adapter-on-one": Attack({1: {"lora": 4}}, disagrees("the weight")),
        "adapter-ranks": Attack({0: {"lora": 4}, 1: {"lora": 2}}, disagrees("lora_A")),
        "other-weights": Attack({1: {"model_seed": 5}}, ends_well),
        "other-weights-in-bfloat16": Attack({1: {"model_seed": 5}}, ends_well, {"dtype": "bfloat16"}),
        "optimizer-rate": Attack(
            {1: {"optimizer": ["SGD", {"lr": 2e-3}]}},
            disagrees("lr of parameter group 0"),
            {"optimizer": ["SGD", {"lr": 1e-3}]},
        ),
        "optimizer-class": Attack(
            {1: {"optimizer": adamw}}, disagrees("the optimizer"), {"optimizer": ["SGD", {"lr": 1e-3}]}
        ),
        "optimizer-betas": Attack(
            {1: {"optimizer": ["AdamW", {"lr": 1e-3, "betas": [0.5, 0.9]}]}}, disagrees("betas"), {"optimizer": adamw}
        ),
        "optimizer-on-one": Attack({1: {"optimizer": ["SGD", {"lr": 1e-2}]}}, lambda *end: refused([], *end)),
        "resume-on-one": Attack({1: {"resume": "checkpoint-3"}}, ends_badly),
        "third-rank-seed": Attack(
            {2: {"options": {"seed": 9}}}, disagrees("seed is 42 on rank 0 and 9 on rank 2"), world_size=3
        ),
        "many-arguments": Attack(
            {1: {"options": {"seed": 9, "learning_rate": 0.5, "weight_decay": 0.1, "max_steps": 9}}},
            disagrees("and 1 more"),
        ),
        "one-batch-for-one-gpu": Attack(
            {}, says("auto_find_batch_size=True"), {"options": {"auto_find_batch_size": True}}
        ),
        "batch-search-on-one": Attack({1: {"options": {"auto_find_batch_size": True}}}, ends_badly),
        "agreement": Attack({}, ends_well),
    }


def _changes() -> dict[str, Attack]:
    """Return runs in which weights change on one rank, shorter than `zo_check_steps`."""
    table = {}
    for what, tensor in (("weight", WEIGHT), ("coordinate", COORDINATE)):
        for rank in (0, 1):
            one = {"where": "callback", "happens": what, "tensor": tensor}
            table[f"{what}-of-{rank}-before-a-checkpoint"] = Attack(
                {rank: one}, differs(tensor, "at step 3"), {"options": FROZEN}
            )
            table[f"{what}-of-{rank}-before-the-end"] = Attack(
                {rank: one | {"step": 5}}, differs(tensor, "at step 6"), {"options": FROZEN | {"save_strategy": "no"}}
            )
            table[f"{what}-of-{rank}-after-a-checkpoint"] = Attack(
                {rank: one | {"step": 4}}, differs(tensor, "at step 6", saved=True), {"options": FROZEN}
            )
            table[f"{what}-of-{rank}-at-the-last-step"] = Attack(
                {rank: one | {"step": 6}}, differs(tensor, "at step 6"), {"options": FROZEN | {"save_strategy": "no"}}
            )
        one = {"where": "on_train_begin", "happens": what, "tensor": tensor}
        table[f"{what}-before-the-first-step"] = Attack({1: one}, differs(tensor, "at step 0"), {"options": FROZEN})
    return table


MOMENTS = ("start", "on_train_begin", "loss", "callback", "data", "on_save", "on_evaluate", "on_log")
#: Exit code of a process to which this happens (None: any), and the moments.
HAPPENINGS: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "kill": (-signal.SIGKILL, MOMENTS),
    "stop": (-signal.SIGKILL, MOMENTS),
    "raise": (1, MOMENTS),
    "memory": (1, ("loss", "on_evaluate")),
    "exit": (0, ("callback", "on_save")),
    "interrupt": (None, ("callback", "data")),
}


def _losses() -> dict[str, Attack]:
    """Return runs in which a rank stops, dies or raises, at different moments."""
    table = {}
    evaluates = {"options": {"eval_strategy": "steps", "eval_steps": 2}}
    for happens, (code, moments) in HAPPENINGS.items():
        for where in moments:
            shared = evaluates | {"where": where}
            table[f"{happens}-at-{where}"] = Attack({1: {"happens": happens}}, names_lost(1, own=code), shared)
    for happens in ("kill", "stop", "raise"):
        code, shared = HAPPENINGS[happens][0], {"where": "loss"}
        table[f"{happens}-of-the-first"] = Attack({0: {"happens": happens}}, names_lost(0, own=code), shared)
        table[f"{happens}-among-three"] = Attack(
            {1: {"happens": happens}}, names_lost(1, own=code), shared, world_size=3
        )
    table["end-of-one"] = Attack({1: {"happens": "end"}}, ends_badly, {"where": "callback"})
    return table


def cases() -> list[Case]:
    """Return the whole table."""
    table = _starts() | _changes() | _losses() | _arguments()
    return [Case(name, attack) for name, attack in table.items()]
