"""A core between two orthonormal bases: r × r numbers for every weight matrix.

SubZero (Yu et al., arXiv 2410.08989):

    W(S) = W + √(mn)/r · U · S · Vᵀ      S: (r, r), the coordinates, float32, zero after a fold
                                         U: (m, r), V: (n, r), orthonormal, Haar-distributed, kept for `fold_steps` steps
    fold:  W ← W + √(mn)/r · U · S · Vᵀ,   S ← 0,   U, V ← new draws

With the factor √(mn)/r, an entry of the perturbation has unit variance. Therefore ε and the learning rate mean the
same as for a dense direction. The Q of a QR decomposition is Haar-distributed only if the diagonal of R is made
positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.directions import GAUSSIAN
from zo_hf.method_info import Method
from zo_hf.rng import Purpose, Stream, draw_slice
from zo_hf.rng.single_thread import single_thread
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.low_rank import LowRank


class Core(LowRank):
    """Cores as coordinates, as in the formula above; a parameter of one dimension moves as a whole.

    The arguments are those of `LowRank`.
    """

    name = "core"
    about = Method("SubZero (2410.08989)", memory="r(m + n) per matrix for U and V; 2d for S and its gradient")
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
            self._left_bases[name] = left.to(self.coordinates[name].dtype).to(site.device)
            self._bases.take(name, right.to(site.device))

    def read_at_point(self) -> list[Tensor]:
        return [*super().read_at_point(), *self._left_bases.values()]

    def _orthonormal(self, stream: Stream, name: str, rows: int) -> Tensor:
        """Draw an orthonormal basis, float64 (rows, r), on the CPU, so that every kind of device has the same one."""
        noise = draw_slice(stream, name, 0, rows * self.rank, GAUSSIAN).view(rows, self.rank)
        with single_thread():
            q, r = torch.linalg.qr(noise.double())
        return q * r.diagonal().sign()

    def _has_factors(self, device: torch.device) -> bool:
        return False  # a factor is a product of its own

    def _is_factored(self, shape: torch.Size) -> bool:
        return min(shape) > self.rank

    def _coordinate_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((self.rank, self.rank))

    def _left(self, name: str) -> Tensor:
        return self._left_bases[name] @ self.coordinates[name].detach()

    def _left_at_point(self, name: str) -> Tensor:
        return self._left_bases[name] @ self._coordinate_blocks.at_point(name)
