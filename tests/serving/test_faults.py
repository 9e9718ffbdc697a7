"""Servers that fail: what the trainer waits for, what it tries again, and what ends a run in one sentence."""

from __future__ import annotations

import _thread
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import assert_same_bits, seeded, tiny_llama
from tests.serving.runs import adapter_of, base, lora, make
from tests.serving.stand_in import StandIn, serving
from tests.trainer.runs import At
from zo_hf.serving import ServingError, fleet
from zo_hf.serving.client import Server
from zo_hf.serving.errors import ServerLost

LOAD, COMPLETE = "/v1/load_lora_adapter", "/v1/completions"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE", 0.02)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The adapter after a run in which nothing fails."""
    with serving(base) as stand_in:
        trainer = make(tmp_path_factory.mktemp("run"), stand_in.url)
        trainer.train()
    return adapter_of(trainer)


def cut(content: Any) -> Any:
    return {"choices": content["choices"][:-1]}


def without_a_token(content: Any) -> Any:
    content["choices"][0]["prompt_logprobs"].pop()
    return content


#: Status and content of wrong answers; a function makes the content from the right one.
FAULTS: dict[str, tuple[int, Any]] = {
    "an internal error": (500, {"error": {"message": "out of memory"}}),
    "it is busy": (503, b"busy"),
    "no JSON": (200, b"<html>"),
    "a row is missing": (200, cut),
    "a token is missing": (200, without_a_token),
    "it was started anew": (404, {"error": {"message": "The model does not exist."}}),
}


class Wrong:
    """A fault of every n-th request about an adapter: one of some wrong answers after another.

    Args:
        stand_in: knows the right answers.
        n: how often.
        names: of `FAULTS`.
    """

    def __init__(self, stand_in: StandIn, n: int, names: Sequence[str]) -> None:
        self._stand_in, self._n, self._names = stand_in, n, list(names)
        self.seen: list[str] = []
        self._requests, self._lock = 0, threading.Lock()

    def __call__(self, path: str, body: Any) -> tuple[int, Any] | None:
        if path != COMPLETE or body["model"] == "base":
            return None
        with self._lock:
            self._requests += 1
            if self._requests % self._n:
                return None
            name = self._names[len(self.seen) % len(self._names)]
            self.seen.append(name)
        status, content = FAULTS[name]
        if callable(content):
            with self._stand_in._lock:
                content = content(self._stand_in._true_answer(path, body)[1])
        return status, content


def test_passing_faults_change_nothing(expected: Any, tmp_path: Path) -> None:
    with serving(base) as stand_in:
        trainer = make(tmp_path, stand_in.url)
        wrong = Wrong(stand_in, 2, list(FAULTS))
        trainer.add_callback(At({1}, lambda *_, **__: setattr(stand_in, "fault", wrong)))
        trainer.train()
    assert set(wrong.seen) == set(FAULTS)
    assert_same_bits(adapter_of(trainer), expected)


def test_a_lasting_fault_ends_the_run(tmp_path: Path) -> None:
    with serving(base) as stand_in:
        trainer = make(tmp_path, stand_in.url)

        wrong = Wrong(stand_in, 1, ["a token is missing"])
        trainer.add_callback(At({1}, lambda *_, **__: setattr(stand_in, "fault", wrong)))
        with pytest.raises(ServingError, match="has failed 5 times at the same request, at last because: "):
            trainer.train()
    assert trainer.state.global_step == 1 and trainer.zo is None


def test_a_server_that_dies_and_returns(expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "NEWS", 0.0)
    said: list[str] = []
    with serving(base) as stand_in:
        trainer = make(tmp_path, stand_in.url)

        def warning(text: str, *values: Any) -> None:
            said.append(text % values)
            if len(said) == 2:
                stand_in.start()

        monkeypatch.setattr(fleet.logger, "warning", warning)
        trainer.add_callback(At({1}, lambda *_, **__: stand_in.stop()))
        trainer.train()
    assert_same_bits(adapter_of(trainer), expected)
    gone = r"is gone \(\[Errno 111\] Connection refused\); waiting for it since \d+ of at most 30 seconds"
    assert re.search(gone, said[0])
    assert re.search(r"is back after \d+ seconds", said[-1])


def test_another_server_takes_over(expected: Any, tmp_path: Path) -> None:
    with serving(base) as first, serving(base) as second:
        trainer = make(tmp_path, [first.url, second.url])
        trainer.add_callback(At({1}, lambda *_, **__: first.stop()))
        trainer.train()
    assert_same_bits(adapter_of(trainer), expected)


def test_a_server_that_stays_away_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 1000 * time.monotonic())
    with serving(base) as stand_in:
        trainer = make(tmp_path, stand_in.url)

        def stop(*_: Any, **__: Any) -> None:
            monkeypatch.setattr(fleet, "time", clock)
            stand_in.stop()

        trainer.add_callback(At({1}, stop))
        with pytest.raises(ServingError, match=r"has been gone for 30 seconds .*; start it again and resume from"):
            trainer.train()
    assert trainer.state.global_step == 1


def test_a_server_that_does_not_answer_in_time() -> None:
    is_over = threading.Event()
    with serving(base) as stand_in:
        stand_in.fault = lambda path, body: is_over.wait(60) and None
        with pytest.raises(ServerLost, match=r"no answer within 0.1 seconds"):
            Server(stand_in.url, 0.1).base()
        is_over.set()


def test_a_server_that_returns_with_another_model_ends_the_run(tmp_path: Path) -> None:
    with serving(base) as stand_in, serving(other) as another:
        trainer = make(tmp_path, stand_in.url)

        def exchange(*_: Any, **__: Any) -> None:
            stand_in.stop()
            stand_in._base, stand_in._adapted, stand_in._config = another._base, None, b""
            stand_in.start()

        trainer.add_callback(At({1}, exchange))
        with pytest.raises(ServingError, match="serves another model than the one that is trained"):
            trainer.train()


def other() -> Any:
    return seeded(tiny_llama, seed=1, eos_token_id=1, initializer_range=0.2)


def message_at_start(stand_in: StandIn, folder: Path, **options: Any) -> str:
    """The error of a training that does not begin, one sentence."""
    trainer = make(folder, stand_in.url, **options)
    with pytest.raises((ServingError, ValueError)) as error:
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.zo is None
    message = str(error.value)
    assert message.endswith(".") and "; " in message and "\n" not in message
    return message


def test_another_base_model(tmp_path: Path) -> None:
    with serving(other) as stand_in:
        assert "serves another model than the one that is trained" in message_at_start(stand_in, tmp_path)


def test_limits_of_the_server(tmp_path: Path) -> None:
    with serving(base, max_rank=2) as stand_in:
        message = message_at_start(stand_in, tmp_path)
        assert "(LoRA rank 4 is greater than max_lora_rank 2); start it with --max-lora-rank 4 or more" in message
    with serving(base, max_adapters=0) as stand_in:
        assert "--max-loras 2 or more, or lower server_max_loras" in message_at_start(stand_in, tmp_path)


def test_a_server_that_leaves_out_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serving import stand_in as module

    def without_mlp(model: Any, tensors: dict[str, Any]) -> Any:
        return load(model, {name: t * (0.0 if "mlp" in name else 1.0) for name, t in tensors.items()})

    load = module.set_peft_model_state_dict
    monkeypatch.setattr(module, "set_peft_model_state_dict", without_mlp)
    with serving(base) as stand_in:
        assert "does not apply the whole adapter" in message_at_start(stand_in, tmp_path)
        assert not stand_in.adapters


def test_no_adapters_at_run_time(tmp_path: Path) -> None:
    with serving(base) as stand_in:
        stand_in.fault = lambda path, body: (404, {"detail": "Not Found"}) if path == LOAD else None
        message = message_at_start(stand_in, tmp_path)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in message


def test_a_folder_that_the_server_cannot_read(tmp_path: Path) -> None:
    with serving(base) as stand_in:
        stand_in.fault = lambda path, body: (
            (404, {"error": {"message": f"No adapter found at {body['lora_path']}"}}) if path == LOAD else None
        )
        assert "set server_folder=... to a folder that it shares" in message_at_start(stand_in, tmp_path)
    with serving(base) as stand_in:
        message = message_at_start(stand_in, tmp_path, server_folder=str(tmp_path / "missing"))
    assert "missing' cannot be written to (No such file or directory)" in message


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with serving(base) as stand_in:
        pass
    assert "does not work ([Errno 111] Connection refused); start it" in message_at_start(stand_in, tmp_path)


def test_a_server_that_wants_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(base) as stand_in:
        stand_in.fault = lambda path, body: (401, {"error": {"message": "Unauthorized"}})
        assert "put its key into the variable VLLM_API_KEY" in message_at_start(stand_in, tmp_path)
        monkeypatch.setenv("VLLM_API_KEY", "of a test")
        stand_in.fault, stand_in.headers = None, []
        make(tmp_path, stand_in.url, max_steps=1).train()
    assert {headers["Authorization"] for headers in stand_in.headers} == {"Bearer of a test"}


def test_no_files_stay(tmp_path: Path) -> None:
    with serving(base) as stand_in:
        make(tmp_path / "run", stand_in.url, server_folder=str(tmp_path)).train()
        folders = {body["lora_path"] for path, body in stand_in.requests if path == LOAD}
        assert len(folders) == 14 and all(Path(folder).is_relative_to(tmp_path) for folder in folders)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_training_that_does_not_begin_leaves_nothing(tmp_path: Path) -> None:
    with serving(base) as right, serving(other) as wrong:
        trainer = make(tmp_path / "run", [right.url, wrong.url], server_folder=str(tmp_path))
        with pytest.raises(ServingError, match=f"{wrong.url} serves another model"):
            trainer.train()
        assert not right.adapters and not wrong.adapters
    assert [path.name for path in tmp_path.iterdir()] in ([], ["run"])


@pytest.mark.parametrize("key", ["se\ncret", "secret\u20ac"])
def test_no_message_repeats_a_key(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with serving(base) as stand_in:
        message = message_at_start(stand_in, tmp_path)
    assert "the variable VLLM_API_KEY has a character" in message and "cret" not in message


def test_a_key_may_end_in_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of a test\n")
    with serving(base) as stand_in:
        Server(stand_in.url, 5.0).base()
    assert stand_in.headers[0]["Authorization"] == "Bearer of a test"


def test_an_interrupt_ends_the_run_at_once(tmp_path: Path) -> None:
    with serving(base) as stand_in:
        trainer = make(tmp_path, stand_in.url)
        before = {name: p.detach().clone() for name, p in lora().named_parameters()}

        def interrupt(path: str, body: Any) -> None:
            # The first adapter is that of the comparison before training.
            if path == COMPLETE and body["model"] != "base" and len(stand_in.requests) > 8:
                _thread.interrupt_main()

        stand_in.fault = interrupt
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert_same_bits({n: p.detach() for n, p in trainer.model.named_parameters()}, before)


#: A self-signed certificate from one day to another, which `openssl req` cannot make.
AUTHORITY = """
[ca]
default_ca = own
[own]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = names
x509_extensions = more
[names]
commonName = supplied
[more]
subjectAltName = {names}
"""


def certificate(folder: Path, names: str, start: datetime, end: datetime) -> Path:
    """Make a key and a self-signed certificate in one file; the certificate alone is in the file `crt` beside it."""
    key, request, made, config = (folder / name for name in ("server.pem", "csr", "crt", "config"))
    config.write_text(AUTHORITY.format(folder=folder, names=names), encoding="utf-8")
    (folder / "index.txt").touch()
    asks = f"req -newkey rsa:2048 -nodes -subj /CN=tests -keyout {key} -out {request}"
    days = f"-startdate {start:%Y%m%d%H%M%SZ} -enddate {end:%Y%m%d%H%M%SZ}"
    signs = f"ca -batch -notext -selfsign -config {config} -keyfile {key} -in {request} -out {made} {days}"
    for words in (asks, signs):
        subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    key.write_text(key.read_text(encoding="utf-8") + made.read_text(encoding="utf-8"), encoding="utf-8")
    return key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
@pytest.mark.parametrize(
    ("names", "first", "last", "sentence"),
    [
        ("IP:127.0.0.1", -1, 1, None),
        ("IP:127.0.0.1", -3, -1, r"has a certificate that has expired \(.*\); renew it on the server, .* anew\.$"),
        (
            "IP:127.0.0.1",
            1,
            3,
            r"has a certificate that is not valid yet \(.*\); set the clock of this machine, .*\.$",
        ),
        ("IP:127.0.0.2", -1, 1, r"has a certificate that names another server \(.*\); set server_url to a name .*\.$"),
    ],
)
def test_a_certificate_is_trusted_by_name_or_ends_the_run(
    names: str, first: int, last: int, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sentence with the way out, which is SSL_CERT_FILE only for one that this machine does not know."""
    now = datetime.now(timezone.utc)
    stand_in = StandIn(base)
    stand_in.certificate = certificate(tmp_path, names, now + timedelta(days=first), now + timedelta(days=last))
    stand_in.start()
    try:
        if sentence is None:
            with pytest.raises(ServingError, match=r"does not trust .* in the variable SSL_CERT_FILE\.$"):
                Server(stand_in.url, 10).base()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "crt"))
        if sentence is None:
            assert Server(stand_in.url, 10).base().name == "base"
        else:
            with pytest.raises(ServingError, match=sentence):
                Server(stand_in.url, 10).base()
    finally:
        stand_in.stop()
