"""`zo-hf sft` and `zo-hf chat` on a tiny model."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.conftest import assert_same_bits, seeded, tiny_llama, tiny_opt
from zo_hf.cli import main as cli
from zo_hf.tasks import sft_job
from zo_hf.tasks.sft_arguments import parse_sft_arguments

pytest.importorskip("trl")

QUESTION, ANSWER = "a deep and moving film", "great"


def of_kind(kind: str, number: int) -> dict[str, Any]:
    question, answer = f"{QUESTION} {number}", ("great", "terrible")[number % 2]
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {
        "messages": {"messages": [user, assistant]},
        "chats": {"prompt": [user], "completion": [assistant]},
        "pairs": {"prompt": question, "completion": f" . It was {answer}"},
        "text": {"text": f"{question} . It was {answer}"},
    }[kind]


def write_rows(path: Path, kind: str, number: int = 20) -> Path:
    path.write_text("".join(json.dumps(of_kind(kind, i)) + "\n" for i in range(number)))
    return path


@pytest.fixture
def small_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = seeded(tiny_llama, vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=2)
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def words(tmp_path: Path, small_model: Path) -> Callable[..., list[str]]:
    def made(rows: Path | None = None, **options: Any) -> list[str]:
        usual = {"model_name_or_path": small_model, "output_dir": tmp_path / "out", "max_steps": 2, "eval_steps": 2}
        usual |= {"logging_steps": 1, "use_cpu": True, "learning_rate": 1e-3, "disable_tqdm": True}
        given = usual | ({} if rows is None else {"train_file": rows}) | options
        return ["sft", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]

    return made


def metrics(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return read


def answer(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    cli.main(["chat", str(folder), "--prompt", QUESTION, "--max_new_tokens", "4", *options])
    return capsys.readouterr().out


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    shown = capsys.readouterr()
    assert end.value.code == 2 and "Traceback" not in shown.err and "before " not in shown.out
    line = shown.err.splitlines()[-1]
    assert line.endswith(".")
    return line.partition("error: ")[2]


@pytest.mark.parametrize("kind", ["messages", "chats", "pairs", "text"])
def test_each_format_trains_reports_and_leaves_a_model_that_answers(
    kind: str, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(words(write_rows(tmp_path / "rows.jsonl", kind)))
    shown = capsys.readouterr().out
    assert ("the tokenizer has none" in shown) == (kind in ("messages", "chats"))
    assert all(line in shown for line in ("18 to train on, 2 held out", "\nbefore ", "\nafter ", "MiB peak"))
    found = metrics(tmp_path / "out")
    assert found["forward_passes"] == 6 and found["loss"] != found["loss_before"]
    assert "zeroth-order-optimization" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "run.png").is_file()
    first = answer(tmp_path / "out", capsys)
    assert first.endswith("\n") and answer(tmp_path / "out", capsys) == first, "the most probable token each time"


def test_ctrl_c_during_the_last_evaluation_says_that_the_model_is_saved(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, calls = sft_job._evaluated, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluated(*arguments)

    monkeypatch.setattr(sft_job, "_evaluated", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(words(write_rows(tmp_path / "rows.jsonl", "pairs")))
    assert end.value.code == 130
    saved = f"interrupted: the trained model is saved in {tmp_path / 'out'}, and its evaluation is not."
    assert saved in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_held_out_loss_falls(words: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "chats")
    cli.main(words(rows, max_steps=60, learning_rate=3e-3, eval_steps=100))
    found = metrics(tmp_path / "out")
    assert found["loss"] < found["loss_before"] - 0.3, found


def test_packed_rows_have_the_loss_that_they_have_alone(words: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "messages")
    found = []
    for packing in (False, True):
        options = {"packing": packing, "max_length": 128, "assistant_only_loss": True, "eval_fraction": 0.2}
        cli.main(words(rows, **options, max_steps=1))
        found.append(metrics(tmp_path / "out")["loss_before"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_an_adapter_is_saved_and_answers(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    rows = write_rows(tmp_path / "rows.jsonl", "chats")
    cli.main(words(rows, use_peft=True, lora_r=2, learning_rate=1e-2))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2 and not (tmp_path / "out" / "model.safetensors").exists()
    assert any(
        tensor.any()
        for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    assert answer(tmp_path / "out", capsys)
    config["megatron_core"] = "os"  # a module that PEFT would import
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    assert "megatron_core" in refused(["chat", str(tmp_path / "out"), "--prompt", "a"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_quantized_models_train_and_answer(
    form: str, use_peft: bool, words: Any, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes has no narrower layers of 4 bits on CPUs
    seeded(tiny_llama, vocab_size=len(tokenizer), max_position_embeddings=128, **wide).save_pretrained(
        tmp_path / "model"
    )
    cli.main(words(write_rows(tmp_path / "rows.jsonl", "chats"), use_peft=use_peft, **{form: True}))
    assert answer(tmp_path / "out", capsys)


def test_resuming_is_bit_exact(words: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "chats")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "zo_fold_steps": 3}
    cli.main(words(rows, **options))
    whole = load_file(tmp_path / "out" / "model.safetensors")
    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    cli.main(
        words(rows, **options, resume_from_checkpoint=tmp_path / "again" / "checkpoint-2", output_dir=tmp_path / "b")
    )
    assert_same_bits(load_file(tmp_path / "b" / "model.safetensors"), whole)


def test_a_yaml_file_has_the_options(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(f"train_file: {write_rows(tmp_path / 'rows.jsonl', 'pairs')}\neval_fraction: 0\nmax_steps: 1\n")
    argv = words(config=file)
    del argv[argv.index("--max_steps") : argv.index("--max_steps") + 2]
    cli.main(argv)
    found = metrics(tmp_path / "out")
    assert found["forward_passes"] == 4 and found["held_out_rows"] == 0 and "loss" not in found
    file.write_text("evaluation_fraction: 0\n")
    assert "unknown option 'evaluation_fraction'; write 'eval_fraction'" in refused(words(config=file), capsys)


def test_rows_that_are_cut_are_counted(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "text", 4)
    path.write_text(path.read_text() + json.dumps({"text": f"{QUESTION} " * 200}) + "\n")
    cli.main(words(path, eval_file=path, max_length=1000))
    shown = capsys.readouterr().out
    assert shown.count("1 of 5 rows have more than 128 tokens (all that the model has positions for)") == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "completion": ({"completion_only_loss": True}, "--completion_only_loss needs rows of prompt and completion"),
    "assistant": ({"assistant_only_loss": True}, "--assistant_only_loss needs messages"),
    "fraction": ({"eval_fraction": 1.5}, "--eval_fraction 1.5 is not between 0 and 1"),
    "code": ({"trust_remote_code": True}, "zo-hf sft does not take --trust_remote_code"),
    "two formats": ({"load_in_8bit": True, "load_in_4bit": True}, "are two formats"),
    "no model": ({"model_name_or_path": "/none", "offline": True}, "could not be loaded"),
    "end": ({"eos_token": "<end>"}, "--eos_token <end> is not a token of the tokenizer"),
    "length": ({"max_length": 0}, "--max_length 0 must be at least 1"),
    "folder": ({"output_dir": f"{__file__}/out"}, "is not a folder, because"),
    "method": ({"zo_rank": 0}, "zo_rank=0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_options_are_one_sentence(
    kind: str, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = REFUSED[kind]
    assert message in refused(words(write_rows(tmp_path / "rows.jsonl", "text"), **options), capsys)


@pytest.mark.parametrize(
    ("more", "rate"),
    [([], 1e-4), (["--use_peft"], None), (["--zo_subspace", "norms"], None), (["--learning_rate", "1"], 1)],
)
def test_the_default_rate_is_that_of_low_rank_weights(more: list[str], rate: float | None) -> None:
    assert parse_sft_arguments(["--use_cpu", *more], "zo-hf sft", None)[1].learning_rate == rate


def test_a_refusal_of_the_rows_leaves_the_embedded_model_alone(
    words: Any, tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZO_HF_CACHE", str(tmp_path))
    monkeypatch.setattr("zo_hf.tasks.sft_task.default_model", lambda: small_model)
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    argv = words(rows, max_length=1, assistant_only_loss=True)
    del argv[1:3]
    assert "--assistant_only_loss needs messages" in refused(argv, capsys)
    assert small_model.is_dir(), "unpacked anew, as if it were damaged"


def test_a_wrong_file_is_refused_before_the_model_is_loaded(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": 1}\n')
    argv = words(tmp_path / "rows.jsonl", model_name_or_path="/none")
    assert "row 1, has the columns question" in refused(argv, capsys)


def test_a_model_whose_rows_see_each_other_packs_none(
    words: Any, tmp_path: Path, small_model: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seeded(tiny_opt, vocab_size=len(tokenizer)).save_pretrained(small_model)
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    assert "--packing does not work with OPTForCausalLM" in refused(words(rows, packing=True, eval_fraction=0), capsys)


def test_without_trl_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_hf.tasks.sft_arguments.find_spec", lambda name: None)
    assert "pip install 'zo_hf[trl]'" in refused(["sft"], capsys)


def test_help_shows_the_recipes_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: zo-hf sft [options]") and "(default: 250)" in shown
    assert "--train_file VALUE" in shown and "--adam_beta1" not in shown


@pytest.fixture
def folder(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What a run has left."""
    cli.main(words(write_rows(tmp_path / "rows.jsonl", "chats"), max_steps=1, eval_fraction=0))
    capsys.readouterr()
    return tmp_path / "out"


def test_a_conversation_a_pipe_and_a_temperature(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = answer(folder, capsys)
    assert answer(folder, capsys, "--temperature", "5") is not None
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    capsys.readouterr()
    cli.main(["chat", str(folder), "--max_new_tokens", "4"])
    assert capsys.readouterr().out == once
    asked = iter([QUESTION, "", f"{QUESTION} " * 20, QUESTION])

    def ask(_: str) -> str:
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", Terminal())
    cli.main(["chat", str(folder), "--max_new_tokens", "4"])
    shown = capsys.readouterr().out
    assert shown.startswith("Write a message and press Enter; Ctrl-D ends.\n" + once)
    assert "forgets the oldest message" in shown and "positions; write a shorter one." in shown


class Terminal(io.StringIO):
    """A standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature -1 must be a finite number"),
        (["--temperature", "nan"], "--temperature nan must be a finite number"),
        (["--prompt", " "], "the message is empty"),
        (["--prompt", "a " * 500], "positions; write a shorter one"),
    ],
)
def test_wrong_chats_are_one_sentence(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["chat", str(folder), *options], capsys)


def test_broken_weights_answer_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "weights that are not finite" in refused(["chat", str(folder), "--prompt", "a"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no chat.json; name the output folder of a finished `zo-hf sft`"),
        ("[]", "its object is missing"),
        ("{", "it is not valid JSON"),
        ('{"is_chat": 1, "quantization": null}', "is_chat is missing or has a value"),
        (
            '{"is_chat": true, "quantization": {"quant_method": "bitsandbytes", "module": "os"}}',
            "its quantization has module",
        ),
        ('{"is_chat": true}', "the tokenizer in"),
    ],
)
def test_a_folder_without_a_usable_chat_is_one_sentence(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "chat.json").write_text(content)
    assert message in refused(["chat", str(tmp_path), "--prompt", "a"], capsys)


def test_answers_cannot_command_a_terminal() -> None:
    from zo_hf.cli.chat import printable

    assert printable("a\x1b[2J\r\x07b\n\tc") == "a[2Jb\n\tc" and not re.search(r"\x1b", printable("\x1b]0;x"))
