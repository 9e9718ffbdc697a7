"""Errors of a collective that failed because another process is gone, as one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from time import monotonic

from torch import distributed as dist
from torch.distributed import distributed_c10d

#: Seconds in which a process that lives says so when another one is lost.
GRACE = 5.0
#: The rank whose process holds the store through which processes find each other, unless a launcher holds it.
HOLDER = 0


class RankLost(RuntimeError):
    """Raised if another process of the run is gone."""


def set_timeout(seconds: float) -> None:
    """Set how long a collective of this process waits for the others, which accelerate leaves at 30 minutes on CPUs.

    Without several processes this does nothing.
    """
    if dist.is_available() and dist.is_initialized():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Replace the error of a collective that failed because another process is gone by one clear sentence.

    Raises:
        RankLost: a process died, or did not answer within `ddp_timeout` seconds.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError that begins with the path of gloo's own source file.
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise RankLost(
            f"{_named(silent_ranks())} of this run has stopped or does not answer; read its last messages, and restart with "
            "resume_from_checkpoint=True and the same total batch size (ddp_timeout sets how long processes wait)."
        ) from error


def silent_ranks() -> list[int]:
    """Return the ranks that do not say within `GRACE` seconds that they live; empty if that cannot be known.

    Every process that has lost another calls this, and the others it hears of are those that call it, too.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    own, others = dist.get_rank(), set(range(dist.get_world_size())) - {dist.get_rank()}
    # A store whose process is stopped never answers, whatever its time limit, so another thread asks.
    found: list[list[int]] = []
    thread = Thread(target=lambda: found.append(_silent_among(own, others)), daemon=True)
    thread.start()
    thread.join(GRACE + 2)
    return found[0] if found else [HOLDER]


def _silent_among(own: int, silent: set[int]) -> list[int]:
    store, deadline = distributed_c10d._get_default_store(), monotonic() + GRACE
    try:
        store.set(_key(own), "")
        store.wait([_key(own)], timedelta(seconds=GRACE))
    except RuntimeError:  # the store is gone with the process that holds it
        return [HOLDER]
    while silent and monotonic() < deadline:
        for rank in sorted(silent):
            try:
                store.wait([_key(rank)], timedelta(seconds=0.2))
                silent.discard(rank)
            except dist.DistStoreError:  # not yet
                continue
            except RuntimeError:
                return sorted(silent)
    return sorted(silent)


def _key(rank: int) -> str:
    return f"zo_hf/lives/{rank}"


def _named(ranks: list[int]) -> str:
    if not ranks:
        return "another process"
    return f"the process of rank {', '.join(map(str, ranks))}"
