"""Low-rank factors as a LoRA adapter in PEFT's format: A = Vᵀ/√r, B = B, lora_alpha = r."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from zo_hf.quantization import QuantizedLayer
from zo_hf.reason import reason_of
from zo_hf.subspaces.adapter_config import read_adapter_config
from zo_hf.subspaces.sites import Site

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from peft import LoraConfig

    AdapterWeights = Mapping[str, tuple[Tensor, Tensor]]


def is_expressible(model: nn.Module, site: Site) -> bool:
    """Return True if the site is a weight of linear layers other than the output layer, as in PEFT's "all-linear"."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return all(
        attribute == "weight" and module is not output and (site.layer is not None or isinstance(module, nn.Linear))
        for module, attribute in site.uses
    )


def check_expressible(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse sites that a LoRA adapter of linear layers cannot hold.

    Raises:
        ValueError: an adapter cannot hold a site; the message names the first one.
    """
    for site in sites:
        if not is_expressible(model, site):
            raise ValueError(
                f"zo_target_modules selects {site.name}, which a LoRA adapter of linear layers cannot hold; leave it "
                "out, or fold with zo_fold_steps=50."
            )


def check_head(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a model with a task head that starts at random and that the adapter would not hold.

    Raises:
        ValueError: the model has such a head; the message names it.
    """
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        heads = [site.name for site in sites if site.layer is None and isinstance(site.uses[0][0], nn.Linear)]
        if heads:
            raise ValueError(
                f"{heads[-1]} may be a new head, which a LoRA adapter does not hold; fold with zo_fold_steps=50, or "
                "wrap the model by peft.get_peft_model with its task_type."
            )


def check_wrappable(layer: QuantizedLayer) -> None:
    """Refuse a layer that PEFT cannot wrap with an adapter.

    Raises:
        ValueError: PEFT cannot wrap the layer; the message gives PEFT's reason.
    """
    from peft import LoraConfig, get_peft_model

    trained = [parameter for parameter in layer.module.parameters() if parameter.requires_grad]
    try:
        with torch.random.fork_rng():
            get_peft_model(nn.ModuleDict({"layer": layer.module}), LoraConfig(r=1, target_modules=["layer"]))
    except Exception as error:  # PEFT looks for attributes of the formats that it knows
        reason = reason_of(error)
        raise ValueError(
            f"PEFT cannot put a LoRA adapter around a {type(layer.module).__name__} ({reason}); "
            "use zo_subspace='norms'."
        ) from error
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def is_wrappable(layer: QuantizedLayer) -> bool:
    """Return True if PEFT is installed and can wrap the layer with an adapter."""
    if not is_peft_available():
        return False
    try:
        check_wrappable(layer)
    except ValueError:
        return False
    return True


def check_peft() -> None:
    """Refuse to start a run that only PEFT can finish.

    Raises:
        ValueError: PEFT is not installed.
    """
    if not is_peft_available():
        raise ValueError(
            "zo_fold_steps=0 over a quantized model ends with a LoRA adapter; install peft, or use zo_fold_steps=50."
        )


def lora_config(model: nn.Module, weights: AdapterWeights, rank: int) -> LoraConfig:
    """Build PEFT's description of the adapter."""
    from peft import LoraConfig

    config: Any = getattr(model, "config", None)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(weights),
        inference_mode=True,
        base_model_name_or_path=getattr(config, "_name_or_path", None) or None,
    )


def save_adapter(folder: Path, model: nn.Module, weights: AdapterWeights, rank: int) -> None:
    """Write the adapter to `folder` in PEFT's format.

    Args:
        folder: folder to write to; it is created if missing.
        model: model that the adapter belongs to.
        weights: LoRA's A, (r, n), and B, (m, r), of every layer, by the layer's name.
        rank: r.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    folder.mkdir(parents=True, exist_ok=True)
    lora_config(model, weights, rank).save_pretrained(str(folder))
    save_file(_state(weights), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def with_adapter(model: nn.Module, weights: AdapterWeights, rank: int) -> nn.Module:
    """Wrap `model` in a PEFT model with the adapter. PEFT wraps the layers of `model` in place."""
    from peft import get_peft_model, set_peft_model_state_dict

    config = lora_config(model, weights, rank)
    config.inference_mode = False
    with torch.random.fork_rng():  # PEFT draws an A, which is replaced below
        wrapped = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, _state(weights))
    return wrapped.eval()


def with_saved_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Wrap `model` in a PEFT model with the adapter that `folder` contains.

    Raises:
        ValueError: the adapter's configuration is not one that is handed to PEFT.
    """
    from peft import PeftModel

    config = read_adapter_config(folder)
    wrapped: nn.Module = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True).eval()
    return wrapped


def _state(weights: AdapterWeights) -> dict[str, Tensor]:
    state = {}
    for name, (a, b) in weights.items():
        state[f"base_model.model.{name}.lora_A.weight"] = a.float().contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    return state


def without_read_only(sites: list[Site]) -> list[Site]:
    """Leave out quantized weights that can neither be written nor get an adapter."""
    kinds = {type(site.layer.module): site.layer for site in sites if site.layer is not None}
    stay = {kind for kind, layer in kinds.items() if not layer.can_requantize and not is_wrappable(layer)}
    movable = [site for site in sites if site.layer is None or type(site.layer.module) not in stay]
    return movable or sites


class BaseWarning:
    """Warns whoever takes a state dict while the factors have not become an adapter yet; once is enough."""

    is_given = False

    def __call__(self, *_: Any) -> None:
        if not self.is_given:
            self.is_given = True
            logger.warning(
                "the state dict of this quantized model holds its base, because without folds what is learned becomes a "
                "LoRA adapter when training ends; save it with trainer.save_model(), or fold with zo_fold_steps=50."
            )
