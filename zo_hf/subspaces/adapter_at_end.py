"""Low-rank factors that become a LoRA adapter at the end of a run, in place of a fold into the weights.

B and V of a layer are what LoRA calls B and A = Vᵀ/√r. They become an adapter over a quantized model without folds, whose codes
then stay as they are. Only what a LoRA adapter can hold moves: linear layers, except for the output layer, as with PEFT's
"all-linear".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.lora import (
    BaseWarning,
    check_expressible,
    check_head,
    check_peft,
    check_wrappable,
    is_expressible,
    with_adapter,
    without_read_only,
)
from zo_hf.subspaces.sites import Site


class AdapterAtEnd(Folded):
    """Factors that end as an adapter, if a quantized layer moves and nothing is folded.

    Attributes:
        rank: r.
        factored: sites of the matrices that have factors, by name.
    """

    rank: int
    factored: dict[str, Site]

    @property
    def becomes_adapter(self) -> bool:
        """True if the factors become a LoRA adapter at the end instead of a fold into the weights."""
        return self.fold_steps == 0 and any(site.layer is not None for site in self.sites)

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        sites = super()._find_sites(among)
        if self.fold_steps == 0 and self.target_modules is None:
            sites = without_read_only(sites)
        quantized = {site.name: site.layer for site in sites if site.layer is not None}
        if not quantized:
            return sites
        if self.fold_steps == 0:
            if self.target_modules is not None:
                check_expressible(self.model, sites)
            return [site for site in sites if is_expressible(self.model, site)]
        for name, layer in quantized.items():
            if not layer.can_requantize:
                raise ValueError(
                    f"zo_fold_steps={self.fold_steps} would write {name}, which is in {layer.format}; use "
                    "zo_fold_steps=0, which ends with a LoRA adapter."
                )
        return sites

    def _hook_state_dicts(self) -> None:
        if self.becomes_adapter:  # the factors are written nowhere, so a state dict cannot hold the current weights
            self._state_dict_hooks.append(self.model.register_state_dict_post_hook(BaseWarning()))
        else:
            super()._hook_state_dicts()

    def check_end(self) -> None:
        """Refuse to start a run that cannot be finished because the factors must become an adapter.

        Raises:
            ValueError: PEFT is missing or cannot hold the moving parameters; the message says what to use instead.
        """
        if not self.becomes_adapter:
            return
        check_peft()
        check_head(self.model, self.sites)
        read_only = [site.layer for site in self.sites if site.layer is not None and not site.layer.can_requantize]
        for layer in {type(layer.module): layer for layer in read_only}.values():
            check_wrappable(layer)

    def finish(self, step: int, decay: Mapping[str, float]) -> nn.Module:
        if not self.becomes_adapter:
            return super().finish(step, decay)
        self.clear_gradient()
        self.detach()
        return with_adapter(self.model, self.adapter_weights(), self.rank)

    def adapter_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return copies of LoRA's A = Vᵀ/√r, (r, n), and B, (m, r), of every layer, by the layer's name."""
        return {
            name.removesuffix(".weight"): (self.basis(name).t().clone().contiguous(), self._left(name).clone())
            for name in self.factored
        }

    def basis(self, name: str) -> Tensor:
        """Return V / √r of one matrix, (n, r)."""
        raise NotImplementedError

    def _left(self, name: str) -> Tensor:
        """Return the factor to the left of Vᵀ, (m, r)."""
        raise NotImplementedError
