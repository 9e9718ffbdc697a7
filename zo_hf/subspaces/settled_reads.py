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

    Attributes:
        has_held: True if a loss has read parameters that it held from before.
    """

    def __init__(self, subspace: Subspace, ranks: Ranks) -> None:
        self._subspace, self._ranks = subspace, ranks
        self._has_settled = self.has_held = False

    def settle(self, step: int) -> list[str]:
        """Find out, after the probes of a step, which parameters move from this step on.

        Returns:
            Names of the parameters that did not move before, and do now.
        """
        subspace = self._subspace
        self._look(step + 1)
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

    def _look(self, step: int) -> None:
        held = self._subspace.reads.held
        if held.has_replaced and self._has_settled and not self.has_held:
            logger.warning(
                "step %d found that the loss reads weights from a list of before, such as list(model.parameters()); earlier steps "
                "may have read them without their perturbation, so let such a penalty begin in the first step, with a factor of 0",
                step - 1,
            )
        self.has_held = held.has_replaced
        self._subspace.reads.look(step, self.has_held)

    def resume(self, step: int, still: Iterable[str], has_held: bool) -> None:
        """Continue before a step of a run.

        Args:
            step: number of the step.
            still: names of the only parameters that no probe has read yet, on any rank.
            has_held: see the attribute.
        """
        self.remember(still)
        self.has_held = has_held
        self._subspace.reads.look(step, has_held)

    def remember(self, still: Iterable[str]) -> None:
        """Continue a run in which only the parameters `still` have not been read yet, by a probe on any rank."""
        subspace = self._subspace
        subspace.still = set(still)
        subspace.reads.read_names |= {site.name for site in subspace.sites} - subspace.still
