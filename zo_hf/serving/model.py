"""A model that servers evaluate: its adapter at the points of a step, written, loaded and asked about."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import At
from zo_hf.serving.adapter_files import AdapterFiles
from zo_hf.serving.client import Server
from zo_hf.serving.comparison import comparison
from zo_hf.serving.errors import BadAnswer, ServerLost, ServingError
from zo_hf.serving.fleet import Fleet
from zo_hf.serving.points import moved
from zo_hf.subspaces import Subspace

if TYPE_CHECKING:
    from peft import PeftModel

T = TypeVar("T")

#: Seconds to wait for a server at the end, which may be gone.
_FAREWELL = 5.0


@dataclass(frozen=True)
class Servers:
    """The servers of a run.

    Args:
        urls: their addresses.
        max_loras: number of adapters that each holds at a time.
        folder: the folder for adapters, see `AdapterFiles`.
        timeout: seconds to wait for one answer, and for a server that is gone.
    """

    urls: Sequence[str]
    max_loras: int
    folder: str | None
    timeout: float


class ServedModel:
    """A model with a LoRA adapter that servers evaluate.

    Args:
        model: a PEFT model that `check_servable` accepts.
        servers: the servers, which serve its base model.
        zo: the engine in the model, whose points are evaluated; None evaluates the model as it is.

    Attributes:
        longest: number of tokens that a prompt and its answer may have together; None if no server tells.
        vocabulary: number of tokens of the model.

    Raises:
        ServingError: a server does not answer, serves another model, or does not take the adapter.
        ValueError: an address or the folder cannot be used.
    """

    def __init__(self, model: PeftModel, servers: Servers, zo: ZerothOrder | None) -> None:
        self._servers = [Server(url, servers.timeout) for url in servers.urls]
        self._files = AdapterFiles(model, servers.folder)
        self.vocabulary = int(model.get_base_model().config.get_text_config().vocab_size)
        self._slots = servers.max_loras
        #: An adapter that stays loaded on every server, so that one that has been started anew is known by its absence.
        self._marks: dict[str, str] = {}
        self._fleet = Fleet(self._servers, servers.max_loras, self._check, servers.timeout)
        try:
            self._comparison = comparison(model, self._files, zo)
            lengths = [self._begin(server) for server in self._servers]
        except BaseException:
            self.close()
            raise
        self.longest = min((length for length in lengths if length is not None), default=None)

    def _begin(self, server: Server) -> int | None:
        """Compare a server, and return the number of tokens that a prompt and its answer may have."""
        try:
            self._compare(server)
            return server.base().longest
        except (ServerLost, BadAnswer) as error:
            raise ServingError(f"{server.url} does not work ({error}); start it, or correct server_url.") from error

    def _compare(self, server: Server) -> None:
        name = self._fleet.name()
        self._comparison.check(server, name, self._slots)
        self._marks[server.url] = name

    def _check(self, server: Server) -> None:
        """Compare a server if it has been started anew."""
        if self._marks[server.url] not in server.adapters():
            self._compare(server)

    def at_probes(
        self, subspace: Subspace, probes: Sequence[Probe], at: At, asks: Sequence[Callable[[Server, str], T]]
    ) -> list[T]:
        """Ask at every probe of a step.

        Args:
            subspace: moves the adapter.
            probes: the points.
            at: enters the context of some of them, see `JointLoss`.
            asks: for every probe, what to ask a server about an adapter, given its name.

        Returns:
            The answers, in the order of the probes.

        Raises:
            ServingError: a server refuses, or all of them stay away.
        """

        def write(index: int) -> Any:
            with at((probes[index],), 0):
                return self._files.write(moved(subspace))

        return self._fleet.evaluate(write, asks)

    def as_it_is(self, ask: Callable[[Server, str], T]) -> T:
        """Ask about the model's own adapter; raises as `at_probes` does."""
        (found,) = self._fleet.evaluate(lambda _: self._files.write({}), [ask])
        return found

    def completions(
        self, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]
    ) -> Callable[[Server, str], list[list[int]]]:
        """Return the question for the completions of prompts, see `Server.completions`.

        Raises:
            ServingError: a prompt with its answer is longer than the servers allow.
        """
        self.check_length(max(map(len, prompts), default=0) + options["max_tokens"])
        return lambda server, name: server.completions(name, prompts, options, self.vocabulary)

    def log_probabilities(self, rows: Sequence[Sequence[int]]) -> Callable[[Server, str], list[list[float]]]:
        """Return the question for the log-probabilities of rows, see `Server.log_probabilities`.

        Raises:
            ServingError: a row is longer than the servers allow.
        """
        self.check_length(max(map(len, rows), default=0) + 1)
        return lambda server, name: server.log_probabilities(name, rows)

    def check_length(self, tokens: int) -> None:
        """Refuse a row of more tokens than the servers allow.

        Raises:
            ServingError: it has more.
        """
        if self.longest is not None and tokens > self.longest:
            raise ServingError(
                f"a row has {tokens} tokens with what is generated, and the servers take {self.longest}; shorten the "
                "rows, or start the servers with a larger --max-model-len."
            )

    def close(self) -> None:
        """Forget the adapters that are loaded, and remove their files."""
        for url, name in self._marks.items():
            with contextlib.suppress(ServerLost, BadAnswer, ServingError):
                Server(url, _FAREWELL).unload(name)
        self._files.close()
