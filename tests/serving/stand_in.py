"""A small stand-in for a server: vLLM's protocol over a tiny model, computed by transformers and PEFT.

It computes true log-probabilities and greedy answers, with adapters that it loads from the given folders.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

#: Answers a request in place of the stand-in, given its path and body: (status, content); None lets the stand-in answer.
Fault = Callable[[str, Any], tuple[int, Any] | None]


class StandIn:
    """The state of the server, which outlives the server itself.

    Args:
        build: makes the base model.
        max_rank, max_adapters: its limits.
        longest: number of tokens that a prompt and its answer may have.

    Attributes:
        fault: answers requests wrongly; None answers all of them.
        adapters: folder of every loaded adapter.
        requests, headers: path and body, and the headers, of every request.
        most: the largest number of adapters that were loaded at a time.
        certificate: file with a certificate and its key, with which it answers; None answers without.
        url: its address, the same after it has been started anew.
    """

    def __init__(
        self, build: Callable[[], nn.Module], max_rank: int = 16, max_adapters: int = 64, longest: int = 64
    ) -> None:
        self.max_rank, self.max_adapters, self.longest = max_rank, max_adapters, longest
        self.fault: Fault | None = None
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.adapters: dict[str, str] = {}
        self.most, self._port = 0, 0
        self._lock = threading.Lock()
        self._base: Any = build()
        self._adapted: Any = None
        self._config = b""
        self._server: ThreadingHTTPServer | None = None
        self.certificate: Path | None = None

    @property
    def url(self) -> str:
        return f"http{'' if self.certificate is None else 's'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, without any adapters."""
        self.adapters = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                stand_in._answer(self, None)

            def do_POST(self) -> None:
                stand_in._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has gone away
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with self._lock:
            self.requests.append((handler.path, body))
            self.headers.append(dict(handler.headers))
            fault = self.fault
        found = fault(handler.path, body) if fault is not None else None
        if found is None:
            with self._lock:
                found = self._true_answer(handler.path, body)
        status, content = found
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def _true_answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None, "max_model_len": self.longest}]
            return 200, {"data": cards + [{"id": name, "parent": "base"} for name in self.adapters]}
        if path == "/v1/load_lora_adapter":
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                return _error(404, "The lora adapter cannot be found.")
            return 200, b"Success"
        if path == "/v1/completions":
            if body["model"] not in ("base", *self.adapters):
                return _error(404, f"The model `{body['model']}` does not exist.")
            return 200, {"choices": self._complete(body)}
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, folder: Path) -> tuple[int, Any]:
        if not (folder / "adapter_config.json").is_file():
            return _error(404, f"No adapter found for '{name}' at {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if len(self.adapters) >= self.max_adapters:
            return _error(400, f"{len(self.adapters)} adapters are loaded already.")
        self.adapters[name] = str(folder)
        self.most = max(self.most, len(self.adapters))
        return 200, b"Success"

    @contextmanager
    def _model(self, name: str) -> Iterator[Any]:
        if name == "base":
            with self._adapted.disable_adapter() if self._adapted is not None else nullcontext():
                yield self._base
            return
        folder = Path(self.adapters[name])
        config = (folder / "adapter_config.json").read_bytes()
        if config != self._config:  # to build a PEFT model takes a hundred times as long as to change its weights
            self._base = self._base if self._adapted is None else self._adapted.unload()
            self._adapted = PeftModel.from_pretrained(self._base, str(folder)).eval()
            self._config = config
        set_peft_model_state_dict(self._adapted, load_file(folder / "adapter_model.safetensors"))
        yield self._adapted

    @torch.no_grad()
    def _complete(self, body: Any) -> list[dict[str, Any]]:
        with self._model(body["model"]) as model:
            return [self._choice(model, i, prompt, body) for i, prompt in enumerate(body["prompt"])]

    def _choice(self, model: Any, index: int, prompt: list[int], body: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        ids = torch.tensor([prompt])
        if body.get("prompt_logprobs") is not None:
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            of_tokens = found.gather(-1, ids[0, 1:, None])[:, 0].tolist()
            entries = [{str(t): {"logprob": p, "rank": 1}} for t, p in zip(prompt[1:], of_tokens, strict=True)]
            return choice | {"prompt_logprobs": [None, *entries]}
        answer: list[int] = []
        while len(answer) < body["max_tokens"] and not set(answer) & set(body.get("stop_token_ids", ())):
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]
            if body["temperature"]:
                key = (body["seed"] + 7919 * len(answer)) % (1 << 62)
                uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(key))
                logits = logits / body["temperature"] - (-uniform.log()).log()
            answer.append(int(logits.argmax()))
        return choice | {"token_ids": answer}


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "error", "code": status}}


@contextmanager
def serving(build: Callable[[], nn.Module], **options: Any) -> Iterator[StandIn]:
    """A stand-in that listens inside this context."""
    stand_in = StandIn(build, **options)
    stand_in.start()
    try:
        yield stand_in
    finally:
        stand_in.stop()
