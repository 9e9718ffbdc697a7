"""One OpenAI-compatible server with LoRA adapters at run time, such as vLLM's, and the requests to it."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from zo_hf.serving.answers import BaseModel, adapters, base_model, completions, log_probabilities, message_of
from zo_hf.serving.errors import BadAnswer, ServerLost, ServingError
from zo_hf.untrusted import plain_json

#: The environment variable of the server's key, which vLLM reads, too. An argument would end up in files.
KEY = "VLLM_API_KEY"

#: Tokens of one request for log-probabilities, which bounds the size of the answer.
_TOKENS = 1 << 14
#: Bytes that are read of an answer.
_BYTES = plain_json.MAX_BYTES
#: Requests at a time for the prompts of one adapter, where each needs a request of its own.
_CONCURRENT = 16
_BUSY = (429, 502, 503, 504)
_FORBIDDEN = (401, 403)
_MISSING = 404
#: What is wrong with a certificate and the way out, by OpenSSL's codes; a file of authorities mends none of these.
_CERTIFICATES = {
    9: ("is not valid yet", "set the clock of this machine, or give the server a certificate that is valid now"),
    10: ("has expired", "renew it on the server, and start the server anew"),
    **dict.fromkeys(
        (62, 64),
        ("names another server", "set server_url to a name that is in it, or give the server one for this address"),
    ),
}
_UNTRUSTED = (
    "this machine does not trust",
    "name the file with the certificate of its authority in the variable SSL_CERT_FILE",
)


class Server:
    """A server.

    Args:
        url: its address, with or without `/v1` at the end.
        timeout: seconds that one answer may take.

    Raises:
        ValueError: `url` is not such an address.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self._timeout = url, timeout
        if "@" in url:  # first, because no other message may repeat a password
            raise ValueError(f"server_url has a password in it; put the server's key into the variable {KEY} instead.")
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise ValueError(
                f"server_url={url!r} is not the address of a server; give one such as 'http://127.0.0.1:8000'."
            )
        self._host, self._port, self._is_safe = parts.hostname, port, parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")

    def base(self) -> BaseModel:
        """Return the model that the server serves without an adapter."""
        return base_model(self._json("GET", "/v1/models"))

    def adapters(self) -> set[str]:
        """Return the names of the adapters that are loaded."""
        return adapters(self._json("GET", "/v1/models"))

    def load(self, name: str, folder: str) -> None:
        """Load the adapter in `folder` under a name that the server does not have yet.

        Raises:
            ServingError: the server loads no adapters, or cannot read the folder.
            BadAnswer: the server refuses the adapter.
        """
        status, text = self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        if status == _MISSING and "error" not in _object(text):
            raise ServingError(
                f"{self.url} loads no adapters at run time; start it with --enable-lora and the variable "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
            )
        if status == _MISSING:
            raise ServingError(
                f"{self.url} cannot read {folder} ({message_of(_object(text))}); set server_folder=... to a folder that "
                "it shares with this machine."
            )
        if status >= 400 and status not in (*_BUSY, *_FORBIDDEN):
            raise BadAnswer(message_of(_object(text)))
        self._check(status, text)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ServerLost: the server does not have the adapter, because it has been started anew.
        """
        status, text = self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status == _MISSING:
            raise ServerLost("it has lost its adapters")
        self._check(status, text)

    def log_probabilities(self, name: str, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of every token of every row but its first.

        Args:
            name: the model or adapter.
            rows: tokens of every row, of any lengths.
        """
        found: list[list[float]] = []
        for part in _parts(rows):
            # A server generates one token at least.
            options = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
            found += log_probabilities(self._complete(name, part, options), part)
        return found

    def completions(
        self, name: str, prompts: Sequence[Sequence[int]], options: Mapping[str, Any], vocabulary: int
    ) -> list[list[int]]:
        """Return the tokens of one completion of every prompt.

        Args:
            name: the model or adapter.
            prompts: tokens of every prompt.
            options: arguments of the request, with `max_tokens`. A list `seed` has one for every prompt.
            vocabulary: number of tokens of the model.
        """
        longest = options["max_tokens"]

        def ask(part: Sequence[Sequence[int]], more: Mapping[str, Any]) -> list[list[int]]:
            answer = self._complete(name, part, {**options, **more, "return_token_ids": True})
            return completions(answer, len(part), longest, vocabulary)

        seeds = options.get("seed")
        if not isinstance(seeds, list):
            return [tokens for part in _parts(prompts, longest) for tokens in ask(part, {})]
        with ThreadPoolExecutor(min(_CONCURRENT, len(prompts))) as pool:  # a seed is that of a whole request
            found = pool.map(lambda prompt, seed: ask([prompt], {"seed": seed}), prompts, seeds)
            return [tokens for (tokens,) in found]

    def _complete(self, name: str, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> Any:
        # Without the salt, a server could take keys and values of an adapter that had the name before.
        request = {"model": name, "prompt": [list(prompt) for prompt in prompts], "cache_salt": name, **options}
        return self._json("POST", "/v1/completions", request)

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        status, text = self._ask(method, path, body)
        self._check(status, text)
        try:
            return plain_json.parse(text)
        except ValueError as error:
            raise BadAnswer(str(error)) from error

    def _check(self, status: int, text: bytes) -> None:
        """Raise unless the status is 200."""
        if status in _BUSY:
            raise ServerLost(f"it answers with the status {status}")
        if status == _MISSING or status >= 500:
            raise BadAnswer(f"status {status}: {message_of(_object(text))}")
        if status != 200:
            hint = f"; put its key into the variable {KEY}" if status in _FORBIDDEN else ""
            raise ServingError(
                f"{self.url} refuses a request with the status {status} ({message_of(_object(text))}){hint}."
            )

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Return the status and the text of an answer.

        Raises:
            ServerLost: there is none within the time.
            BadAnswer: it is too long.
            ServingError: the server's certificate is not valid or not trusted.
        """
        headers = {"Content-Type": "application/json"} | _authorization()
        kind = http.client.HTTPSConnection if self._is_safe else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        deadline = time.monotonic() + self._timeout
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, text, headers)
            response = connection.getresponse()
            return response.status, self._read(response, deadline)
        except TimeoutError as error:
            raise ServerLost(f"no answer within {self._timeout:g} seconds") from error
        except ssl.SSLCertVerificationError as error:  # a wait does not mend it
            problem, way_out = _CERTIFICATES.get(error.verify_code, _UNTRUSTED)
            raise ServingError(
                f"{self.url} has a certificate that {problem} ({error.verify_message}); {way_out}."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerLost(str(error) or type(error).__name__) from error
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """Return the text of an answer; what is raised is as for `_ask`."""
        found = bytearray()
        while part := response.read1(1 << 16):
            found += part
            if len(found) > _BYTES:
                raise BadAnswer(f"it has more than {_BYTES} bytes")
            if time.monotonic() > deadline:
                raise ServerLost(f"no whole answer within {self._timeout:g} seconds")
        if response.length:
            raise ServerLost("its answer breaks off")
        return bytes(found)


def _authorization() -> dict[str, str]:
    """Return the header with the server's key, if there is one.

    Raises:
        ServingError: the key cannot stand in a header.
    """
    if KEY not in os.environ:
        return {}
    key = os.environ[KEY].strip()
    if not (key.isascii() and key.isprintable()):  # http.client would repeat it in its message
        raise ServingError(f"the variable {KEY} has a character that no key of a server has; correct it.")
    return {"Authorization": f"Bearer {key}"}


def _object(text: bytes) -> dict[str, Any]:
    """Return the object that a text is; an empty one for another text."""
    try:
        content = plain_json.parse(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _parts(prompts: Sequence[Sequence[int]], more: int = 0) -> list[list[Sequence[int]]]:
    """Divide prompts into requests of a bounded number of tokens, each prompt with `more` that are generated."""
    parts: list[list[Sequence[int]]] = []
    tokens = _TOKENS
    for prompt in prompts:
        if tokens + len(prompt) + more > _TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(prompt)
        tokens += len(prompt) + more
    return parts
