"""A core between two orthonormal bases: r × r numbers for every weight matrix.

SubZero (Yu et al., arXiv 2410.08989):

    W(S) = W + √(mn)/r · U · S · Vᵀ      S: (r, r), the coordinates, float32, zero after a fold
                                         U: (m, r), V: (n, r), orthonormal, Haar-distributed, kept for `fold_steps` steps
    fold:  W ← W + √(mn)/r · U · S · Vᵀ,   S ← 0,   U, V ← new draws

With the factor √(mn)/r an entry of the perturbation has unit variance, so ε and the learning rate mean what they mean for
a dense direction. The Q of a QR decomposition is Haar-distributed only if the diagonal of R is made positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.directions import GAUSSIAN, Purpose, Stream, draw_slice
from zo_hf.method import Method
from zo_hf.one_thread import one_thread
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.low_rank import LowRank
from zo_hf.subspaces.shadow import HALF


class Core(LowRank):
    """See the formula above; the arguments are those of `LowRank`. A parameter of one dimension moves as a whole."""

    name = "core"
    about = Method("SubZero (2410.08989)", memory="U, V: r(m + n) per matrix; S, gradient 2d")
    default_rank = 32

    def draw_bases(self, step: int) -> None:
        """Draw U · √(mn)/r, (m, r), and V, (n, r), for every matrix."""
        Folded.draw_bases(self, step)
        stream = Stream(self.seed, step, purpose=Purpose.BASIS)
        self._left_bases: dict[str, Tensor] = {}
        for name, site in self.factored.items():
            rows, columns = site.matrix_shape
            left = self._orthonormal(stream, f"{name}/left", rows) * ((rows * columns) ** 0.5 / self.rank)
            right = self._orthonormal(stream, name, columns)
            dtype, device = self._dtype_of(site), site.parameter.device
            coordinate_dtype = self.coordinates[name].dtype
            self._left_bases[name] = left.to(coordinate_dtype).to(device)
            right = right.to(dtype if dtype in HALF else coordinate_dtype).to(device)
            self._bases[name] = right.t().contiguous().t()

    def _orthonormal(self, stream: Stream, name: str, rows: int) -> Tensor:
        """(rows, r), float64, on the CPU, so that every kind of device has the same."""
        noise = draw_slice(stream, name, 0, rows * self.rank, GAUSSIAN).view(rows, self.rank)
        with one_thread():
            q, r = torch.linalg.qr(noise.double())
        return q * r.diagonal().sign()

    def _is_factored(self, shape: torch.Size) -> bool:
        return min(shape) > self.rank

    def _coordinate_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((self.rank, self.rank))

    def _left(self, name: str) -> Tensor:
        return self._left_bases[name] @ self.coordinates[name].detach()

    def _left_at_point(self, name: str) -> Tensor:
        return self._left_bases[name] @ self._materialised.at_point(name)
