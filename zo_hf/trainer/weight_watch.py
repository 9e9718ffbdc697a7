"""A warning about weights that somebody else than the optimizer writes, such as a callback that clips or averages them.

Between folds, the parameters are those of the last fold. What has moved since is in the coordinates, and is added to whatever is written.
The log of a run holds the optimizer's steps alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class WeightWatch(TrainerCallback):
    """Compares the versions of the parameters that move after a step of the optimizer and before the next one.

    Args:
        parameters: returns the parameters that move, by name.
    """

    def __init__(self, parameters: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        self._parameters = parameters
        self._versions: dict[str, int] = {}
        self._has_told = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the last run."""
        self._versions, self._has_told = {}, False

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Note the versions that the optimizer has left."""
        if not self._has_told:
            self._versions = {name: p._version for name, p in self._parameters().items() if not p.is_inference()}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Warn once of a parameter that has been written since."""
        now = self._parameters()
        written = next((n for n, version in self._versions.items() if n in now and now[n]._version != version), None)
        if written is None:
            return
        self._has_told, self._versions = True, {}
        logger.warning(
            "%s was written between two steps, perhaps by a callback: the log of this run does not replay to such weights, and "
            "between folds a parameter lacks what has moved since the last one; write after steps that fold alone, or use "
            "zo_subspace='full'",
            written,
        )
