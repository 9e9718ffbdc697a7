"""Only the small parameters: weights of normalization layers, and biases of all layers.

    θ(ξ) = θ + ξ        ξ: float32, of the parameter's own shape

In a quantized model these are the parameters that are not quantized, except for the embeddings and the output layer,
which are far larger. LN tuning (arXiv 2312.11420) and BitFit (arXiv 2106.10199) tune only such parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from zo_hf.method_info import Method
from zo_hf.subspaces.low_rank import LowRank
from zo_hf.subspaces.sites import Pattern, Site


class Norms(LowRank):
    """Low-rank coordinates without the matrices. No fold writes to the weights before the end.

    Args:
        model: the model with the parameters that move.
        target_modules: parameters of one dimension that move, see `find_sites`.
        exclude_modules: parameters that do not move.
        among: if given, only these parameters may move, e.g. those of an optimizer.
        seed: seed of the run.
        preconditioner: "none", or "inputs" to divide directions by the size of inputs, see `input_scales`.

    Raises:
        ValueError: no such parameter is selected, or the model cannot give the inputs of its layers.
    """

    name = "norms"
    about = Method("BitFit (2106.10199); LN tuning (2312.11420); K-FAC (1503.05671)", memory="2d")
    default_learning_rate = 1e-3
    moves_quantized = False

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
        preconditioner: str = "none",
    ) -> None:
        super().__init__(model, 1, 0, target_modules, exclude_modules, among, seed, preconditioner=preconditioner)

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        sites = [site for site in super()._find_sites(among) if len(site.shape) < 2]
        if not sites:
            raise ValueError(
                f"zo_subspace='norms' finds no trainable parameter of one dimension in {type(self.model).__name__}; "
                "use zo_subspace='low_rank'."
            )
        return sites
