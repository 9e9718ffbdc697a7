"""Quantization scales as coordinates: QZO (Shang et al., arXiv 2505.13430), as logarithms, to keep them positive.

    Ŵ(ξ) = decode(codes, scales · exp(ξ))        ξ: float32, of the scales' shape, zero at first

The codes never change. At the end, the scales are written in the model's own format. QZO clips the projected gradient,
c ← max(-C, min(c, C)); C is `zo_max_projected_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import GAUSSIAN
from zo_hf.method_info import Method
from zo_hf.quantization import QuantizedLayer
from zo_hf.rng import Purpose, Stream
from zo_hf.rng.rounding import draw_uniform
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.layer_inputs import first_input, require_equal_parts
from zo_hf.subspaces.sites import Pattern, Site
from zo_hf.subspaces.subspace import no_stream


class Scales(Folded):
    """Quantization scales as coordinates, as in the formula above.

    Args:
        model: a model with quantized layers.
        target_modules: weights of the layers with scales that move, see `find_sites`.
        exclude_modules: weights of the layers with scales that do not move.
        among: if given, only the scales of these parameters may move.
        seed: seed of the run.

    Raises:
        ValueError: the model has no quantized layers, or has scales in a format that cannot be written.
    """

    name = "scales"
    about = Method("QZO (2505.13430)", memory="2d", needs="8-bit or 4-bit layers")
    default_learning_rate = 1e-3
    default_max_projected_grad = 100.0
    are_weights = False
    moves_quantized = True

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, 0, target_modules, exclude_modules, among, seed)
        is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
        dtype = torch.float64 if is_double else torch.float32
        for site in self.sites:
            assert site.layer is not None
            zeros = torch.zeros(site.layer.scale_shape, dtype=dtype, device=site.parameter.device)
            self.coordinates[site.name] = nn.Parameter(zeros)
        self._begin()

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        self.check(self.quantized, self.model)
        sites = [site for site in super()._find_sites(among) if site.layer is not None]
        fixed = [site for site in sites if not site.layer.can_requantize]  # type: ignore[union-attr]
        if fixed or not sites:
            where = f"{fixed[0].name} is in {fixed[0].layer.format}" if fixed else "no quantized layer is selected"  # type: ignore[union-attr]
            raise ValueError(f"zo_subspace='scales' cannot be used: {where}; use zo_subspace='low_rank'.")
        return sites

    @staticmethod
    def check(layers: Mapping[nn.Module, QuantizedLayer], model: nn.Module) -> None:
        """Refuse a model without quantized layers.

        Raises:
            ValueError: `layers` is empty.
        """
        if not layers:
            raise ValueError(
                f"zo_subspace='scales' moves the scales of quantized layers, but {type(model).__name__} has none; "
                "load it with a quantization_config, or use zo_subspace='low_rank'."
            )

    @property
    def takes_groups_cheaply(self) -> bool:
        return False  # every group may decode all weights

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        if not self.probes and self._clean_is_stale:
            self._coordinate_blocks.set_point((), no_stream, GAUSSIAN)
            self._clean_is_stale = False
        site, x = self._holders[module]["weight"], first_input(args, kwargs)
        assert site.layer is not None
        groups = max(1, len(self.probes))
        require_equal_parts(x, groups, self.rows_per_probe)
        output = site.layer.scaled_forward(
            original,
            x.reshape(groups, -1, x.shape[-1]),
            self._coordinate_blocks.at_point(site.name),
            exact=bool(self.probes),
        )
        return output.view(*x.shape[:-1], -1)

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the scales, live, by name. The codes are left out because they never change."""
        codes = {
            site.name.removesuffix("weight") + part
            for site in self.sites
            if site.layer is not None
            for part in site.layer.code_parts
        }
        return {name: tensor for name, tensor in super().base_tensors().items() if name not in codes}

    def _fold_quantized(self, storage: dict[str, Tensor], site: Site, step: int, decay: float) -> tuple[float, float]:
        assert site.layer is not None
        log_scales = self.coordinates[site.name].detach()
        stream = Stream(self.seed, step, purpose=Purpose.ROUNDING)
        device = next(iter(storage.values())).device
        uniform = draw_uniform(stream, site.name, 0, log_scales.numel(), device)
        return site.layer.scale(storage, log_scales, uniform)
