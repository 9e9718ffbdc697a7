"""The parameters that a step moves: those that a probe on any rank has read."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from zo_hf.parallel.ranks import Ranks
from zo_hf.subspaces.reports import unread_parameters
from zo_hf.subspaces.subspace import Subspace

logger = logging.getLogger(__name__)


class SettledReads:
    """Keeps parameters still until a probe has read them.

    Args:
        subspace: the subspace that may move them.
        ranks: the processes that train together.
    """

    def __init__(self, subspace: Subspace, ranks: Ranks) -> None:
        self._subspace, self._ranks = subspace, ranks
        self._has_settled = False

    def settle(self, step: int) -> list[str]:
        """Find out, after the probes of a step, which parameters move from this step on.

        Returns:
            Names of the parameters that did not move before, and do now.
        """
        subspace = self._subspace
        if self._has_settled and not subspace.still:
            return []
        first, self._has_settled = not self._has_settled, True
        unread = self._ranks.shared_by_all(list(subspace.coordinates), subspace.reads.unread(), subspace.device)
        before = subspace.still
        self.remember(unread)
        subspace.reads.settle()
        if first and unread:
            logger.warning("%s", unread_parameters(subspace))
        return sorted(before - subspace.still)

    def remember(self, still: Iterable[str]) -> None:
        """Continue a run in which only the parameters `still` have not been read yet, by a probe on any rank."""
        subspace = self._subspace
        subspace.still = set(still)
        subspace.reads.read_names |= {site.name for site in subspace.sites} - subspace.still
