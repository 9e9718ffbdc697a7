"""The lengths of rows that a forward pass shows, by which tokens that a model has joined from rows of unlike length are told.

    rows padded to one length    (rows, length, d), or (rows · length, d) if the model flattens them
    rows joined without padding  (tokens, d), and tokens may be a multiple of rows by chance

Only the first divides into equal parts for groups of rows. A multiple below the length of the padded rows, which no other
tensor of rows has as its length, is taken for the second. It may also be the first, as the patches of images of one size are
for Qwen2-VL. The comparison of a run's first batch tells the two apart, so lengths in a first batch that came apart are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from zo_hf.estimators.probe import NotBatchable


class RowLengths:
    """The lengths that a forward pass has shown so far.

    Args:
        rows: rows of the batch, in all groups.
        accepted: lengths that the run's first batch has had.
        compares: True if this is the first batch, which adds to them.
    """

    def __init__(self, rows: int, accepted: set[int], compares: bool) -> None:
        self._rows, self._accepted, self._compares = rows, accepted, compares
        self._seen: set[int] = set()

    def see(self, inputs: Iterable[object]) -> None:
        """Take note of the lengths of rows that inputs of the model or of a layer have, if they are tensors."""
        for x in inputs:
            if isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] == self._rows and not _is_flat(x):
                self._seen.add(x.shape[1])

    def require_rows(self, inputs: Iterable[object]) -> None:
        """Take note of the inputs of a layer, and refuse them if the first tensor has the joined tokens of rows.

        Raises:
            NotBatchable: it has.
        """
        x = next((value for value in inputs if isinstance(value, Tensor)), None)
        if x is None:
            return
        self.see([x])
        if not _is_flat(x) or x.shape[0] % self._rows:
            return
        length = x.shape[0] // self._rows
        if not 1 < length < max(self._seen, default=0) or length in self._seen | self._accepted:
            return
        if not self._compares:
            raise NotBatchable(
                f"a layer sees {x.shape[0]} tokens of {self._rows} rows that seem to be joined without padding"
            )
        self._accepted.add(length)


def _is_flat(x: Tensor) -> bool:
    """Return whether a tensor has features, but no dimension of tokens beside that of rows."""
    return x.ndim == 2 and x.is_floating_point()
