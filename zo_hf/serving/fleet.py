"""Several servers that share the evaluations of a step, and go on when one of them is gone for a while.

Each server has a number of slots, one for each adapter that it holds at a time. A thread for every slot takes the next
point, loads its adapter, asks, and forgets the adapter. A point whose server is gone goes to another slot.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from zo_hf.serving.client import Server
from zo_hf.serving.errors import BadAnswer, ServerGone, ServerLost, ServingError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often a point is tried.
TRIES = 5
#: Seconds between two questions to a server that is gone, and between two lines of the log about it.
PAUSE, NEWS = 1.0, 30.0


@dataclass
class _Point:
    """One evaluation: its place among the results, the adapter's folder, and how often it was tried."""

    index: int
    folder: Path
    tries: int = 0


@dataclass
class _Work:
    """The evaluations of one call, which the threads of all slots share."""

    count: int
    most_waiting: int
    workers: int
    todo: deque[_Point] = field(default_factory=deque)
    results: dict[int, Any] = field(default_factory=dict)
    under_way: int = 0
    error: BaseException | None = None
    is_stopped: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def is_over(self) -> bool:
        return self.is_stopped or self.error is not None or len(self.results) == self.count

    def wait_for_room(self) -> None:
        """Wait until another point may be written; raises the error of a worker."""
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or self.under_way < self.most_waiting)
            if self.error is not None:
                raise self.error
            self.under_way += 1

    def add(self, point: _Point) -> None:
        with self.changed:
            self.todo.append(point)
            self.changed.notify_all()

    def take(self) -> _Point | None:
        """Wait for a point; None if all are done."""
        with self.changed:
            self.changed.wait_for(lambda: self.todo or self.is_over)
            return None if self.is_over else self.todo.popleft()

    def done(self, point: _Point, result: Any) -> None:
        shutil.rmtree(point.folder, ignore_errors=True)
        with self.changed:
            self.results[point.index] = result
            self.under_way -= 1
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def leave(self, error: ServerGone) -> None:
        """Take note that a worker has given up; the last one's reason becomes the error."""
        with self.changed:
            self.workers -= 1
            if not self.workers and not self.is_over:
                self.error = error
            self.changed.notify_all()

    def wait(self) -> list[Any]:
        with self.changed:
            self.changed.wait_for(lambda: self.is_over)
            if self.error is not None:
                raise self.error
            return [self.results[index] for index in range(self.count)]

    def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until the work is over."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_over, seconds)

    def stop(self) -> None:
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()


class _Member:
    """A server of the fleet, and whether it is gone; the arguments are those of `Fleet`."""

    def __init__(self, server: Server, check: Callable[[Server], None], patience: float) -> None:
        self.server, self._check, self._patience = server, check, patience
        self.is_lost, self._since, self._reason = False, 0.0, ""
        self._told: float | None = None  # when the log last said that it is gone
        self._waiting, self._greeting = threading.Lock(), threading.Lock()
        self._greeted: _Work | None = None
        self.threads: list[threading.Thread] = []

    def room(self, slots: int) -> int:
        """Return how many threads may be started, so that those of a server that never answers do not pile up."""
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        return max(1, 2 * slots - len(self.threads))

    def lose(self, reason: str) -> None:
        """Take note that the server is gone, unless that is known."""
        if not self.is_lost:
            self.is_lost, self._since, self._reason, self._told = True, time.monotonic(), reason, None

    def greet(self, work: _Work) -> None:
        """Check the server before anything is asked, because nobody may have noticed that it has been started anew."""
        with self._greeting:
            if self._greeted is not work:
                try:
                    self._check(self.server)
                except (ServerLost, BadAnswer) as error:
                    self.lose(str(error))
                self._greeted = work
        self.wait(work)

    def wait(self, work: _Work) -> None:
        """Wait until the server is back and still serves the same model, or the work is over.

        Raises:
            ServerGone: it does not come back in time.
            ServingError: it has come back with another model.
        """
        with self._waiting:
            while self.is_lost and not work.is_over:
                # A server that is busy, or about to end, still answers at once.
                work.pause(PAUSE)
                try:
                    self._check(self.server)
                    self.is_lost = False
                except (ServerLost, BadAnswer) as error:
                    now = time.monotonic()
                    if now - self._since > self._patience:
                        raise ServerGone(
                            f"{self.server.url} has been gone for {self._patience:g} seconds ({error}); start it again and "
                            "resume from the last checkpoint."
                        ) from error
                    if self._told is None or now - self._told > NEWS:
                        logger.warning(
                            "%s is gone (%s); waiting for it since %.0f of at most %g seconds",
                            self.server.url,
                            self._reason if self._told is None else error,
                            now - self._since,
                            self._patience,
                        )
                        self._told = now
                else:
                    if self._told is not None:
                        logger.warning(
                            "%s is back after %.0f seconds", self.server.url, time.monotonic() - self._since
                        )


class Fleet:
    """The servers of a run.

    Args:
        servers: at least one.
        slots: number of adapters that each holds at a time.
        check: compares a server's model with the run's, if it has been started anew; called before every step, and for
            servers that come back.
        patience: seconds to wait for a server that is gone.
    """

    def __init__(
        self, servers: Sequence[Server], slots: int, check: Callable[[Server], None], patience: float
    ) -> None:
        self._members = [_Member(server, check, patience) for server in servers]
        self._slots = slots
        # Other runs may use the same server.
        self._run, self._loads = secrets.token_hex(4), 0
        self._naming = threading.Lock()

    def evaluate(self, write: Callable[[int], Path], asks: Sequence[Callable[[Server, str], T]]) -> list[T]:
        """Ask for every point, with its adapter loaded.

        Args:
            write: writes the adapter of a point, given its index, and returns its folder; called in order by this thread.
            asks: gets a server and the adapter's name, and returns the point's result; called by another thread.

        Returns:
            The results, in the order of the points.

        Raises:
            ServingError: a server refuses a request, or all of them stay away.
        """
        room = {member: member.room(self._slots) for member in self._members}
        workers = [member for i in range(self._slots) for member in self._members if i < room[member]]
        work = _Work(len(asks), len(workers), len(workers))
        for member in workers:
            # A daemon, because an answer may be long in coming when this process is told to end.
            thread = threading.Thread(target=self._serve, args=(member, work, asks), daemon=True)
            member.threads.append(thread)
            thread.start()
        try:
            for index in range(len(asks)):
                work.wait_for_room()
                work.add(_Point(index, write(index)))
            return work.wait()
        finally:
            work.stop()

    def name(self) -> str:
        """Return a name for an adapter that no other one has had."""
        with self._naming:
            self._loads += 1
            return f"zo-{self._run}-{self._loads}"

    def _serve(self, member: _Member, work: _Work, asks: Sequence[Callable[[Server, str], Any]]) -> None:
        """Work on points until all are done; the body of a slot's thread."""
        try:
            member.greet(work)
            while (point := work.take()) is not None:
                if member.is_lost:  # as another slot of the same server has found out
                    work.add(point)
                    member.wait(work)
                    continue
                try:
                    work.done(point, self._ask(member.server, point, asks[point.index]))
                except (ServerLost, BadAnswer) as error:
                    self._give_back(point, work, member.server, error)
                    if isinstance(error, ServerLost):
                        member.lose(str(error))
                        member.wait(work)
        except ServerGone as error:
            work.leave(error)
        except BaseException as error:
            work.fail(error)

    def _give_back(self, point: _Point, work: _Work, server: Server, error: Exception) -> None:
        point.tries += 1
        if point.tries == TRIES:
            raise ServingError(
                f"{server.url} has failed {TRIES} times at the same request, at last because: {error}; look into its log."
            )
        work.add(point)

    def _ask(self, server: Server, point: _Point, ask: Callable[[Server, str], T]) -> T:
        name = self.name()
        server.load(name, str(point.folder))
        try:
            return ask(server, name)
        finally:
            server.unload(name)
