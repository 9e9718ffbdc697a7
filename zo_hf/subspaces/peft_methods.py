"""Differences between the methods of PEFT: the scale of their weights, and the few methods that need gradients.

MeZO (arXiv 2305.17333) gives a distance ε and a learning rate for each family of methods. They are the defaults here:

    weights    ε = 1e-3    1e-7 to 1e-6     all weights; of PEFT's methods, those that train weights of the model itself
                                            (LN tuning, which has few and large ones, takes 1e-3: docs/peft.md)
    LoRA       ε = 1e-2    5e-5 to 1e-4     tensors multiplied with or added to the model's weights or activations
    prompt     ε = 1e-1    1e-3 to 1e-2     vectors in front of the sentence or of its keys and values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from zo_hf.method_info import plain

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Family:
    """Defaults for the methods with weights of one scale.

    Args:
        eps: distance ε of a probe.
        learning_rate: default learning rate.
    """

    eps: float
    learning_rate: float


WEIGHTS = Family(1e-3, 1e-5)
NORMS = Family(1e-3, 1e-3)
LORA = Family(1e-2, 1e-4)
# If only the factors that start from zero move, a learning rate three times as large is best (docs/peft.md).
LORA_FROM_ZERO = Family(1e-2, 3e-4)
PROMPT = Family(1e-1, 1e-2)

# Methods by PEFT's names; all others are like LoRA.
_WEIGHTS = ("BEFT", "SHIRA", "TRAINABLE_TOKENS")
_PROMPT = ("ADAPTION_PROMPT", "CARTRIDGE", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
_WEIGHTS_IN_LAYERS = ("ADAPTION_PROMPT", "LN_TUNING")
# These prepend keys and values, so the logits have as many positions as the input.
_KEYS_AND_VALUES = ("CARTRIDGE", "PREFIX_TUNING")
_ADD_TO_THE_LOSS = ("SHADOW",)
_NEED_GRADIENTS = {
    "ADALORA": "AdaLoRA chooses its ranks by the gradients of single weights",
    "CPT": "context-aware prompt tuning scales and bounds gradients in a hook of the backward pass",
    "OSF": "orthogonal subspace fine-tuning projects gradients in hooks of the backward pass",
}


def is_peft(model: nn.Module) -> bool:
    """Return True if `model` has an adapter: a PEFT model, or a transformers model with `model.add_adapter(...)`."""
    return _peft_model(model) is not None or has_own_adapter(model)


def has_own_adapter(model: nn.Module) -> bool:
    """Return True if a transformers model holds an adapter without PEFT's wrapper, by `model.add_adapter(...)`."""
    return isinstance(model, PreTrainedModel) and bool(model._hf_peft_config_loaded)


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model, or `model` itself."""
    peft_model = _peft_model(model)
    return model if peft_model is None else peft_model.get_base_model()


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model's embeddings and output layer, which PEFT may save beside an adapter."""
    inner: Any = base_model(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [part for layer in ends if layer is not None for part in layer.modules()]


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the active adapter, the first one if there are several; None without an adapter."""
    peft_model = _peft_model(model)
    if peft_model is not None:
        return str(peft_model.active_adapters[0])
    if not has_own_adapter(model):
        return None
    own: Any = model
    return str(own.active_adapters()[0])


def family(model: nn.Module) -> Family:
    """Return the family of the active adapter."""
    name = _method(model)
    if name == "LN_TUNING":
        return NORMS
    if name in _WEIGHTS:
        return WEIGHTS
    return PROMPT if name in _PROMPT else LORA


def begins_without_effect(model: nn.Module) -> Callable[[str], bool]:
    """Return a test, by name, for parameters that have no effect on the loss at first.

    These are the factors of a LoRA next to a factor that starts from zero: A, and B for an embedding. Moving them only
    adds noise at first, and later disturbs the factor that has learned.
    """
    config = _config(model)
    from_zero = _method(model) == "LORA" and getattr(config, "init_lora_weights", None) in (True, "gaussian")
    return lambda name: from_zero and bool({"lora_A", "lora_embedding_B"} & set(name.split(".")))


def refuse_what_needs_gradients(model: nn.Module) -> None:
    """Refuse a method of PEFT that needs gradients.

    Raises:
        ValueError: the active adapter is of such a method; the message names it.
    """
    reason = _NEED_GRADIENTS.get(_method(model) or "")
    if reason:
        raise ValueError(f"{reason}, but zo_hf runs no backward pass; use another method of PEFT, such as LoRA.")


def is_weight_of_the_model(model: nn.Module, name: str) -> bool:
    """Return True if the parameter `name` belongs to a layer of the model itself, or to PEFT's copy of one."""
    return _method(model) in _WEIGHTS_IN_LAYERS or "modules_to_save" in name.split(".")


def adds_to_the_loss(model: nn.Module) -> bool:
    """Return True if PEFT adds a term to the loss of the logits."""
    return _method(model) in _ADD_TO_THE_LOSS


def tokens_in_front(model: nn.Module) -> int:
    """Return the number of positions by which the logits are longer than the input, because of a prompt before it."""
    config = _config(model)
    if config is None or not config.is_prompt_learning or _method(model) in _KEYS_AND_VALUES:
        return 0
    return int(config.num_virtual_tokens)


def computes_its_prompt(model: nn.Module) -> bool:
    """Return True if a network computes the prompt.

    PEFT saves such a prompt without its network, so training cannot resume from it.
    """
    config: Any = _config(model)
    method = _method(model)
    return method == "P_TUNING" or (method == "PREFIX_TUNING" and config.prefix_projection)


def of_active_adapter(model: nn.Module) -> list[Tensor] | None:
    """Return the parameters that may move; None means all.

    PEFT leaves the prompts of inactive adapters trainable, but they must not move.
    """
    config, peft_model = _config(model), _peft_model(model)
    if config is None or peft_model is None or not config.is_prompt_learning:
        return None
    others = [f"prompt_encoder.{name}." for name in peft_model.peft_config if name != peft_model.active_adapter]
    return [p for name, p in model.named_parameters() if not any(name.startswith(other) for other in others)]


def _peft_model(model: nn.Module) -> PeftModel | None:
    if not is_peft_available():
        return None
    from peft import PeftModel

    inner: Any = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, PeftModel) else None


def _config(model: nn.Module) -> PeftConfig | None:
    peft_model = _peft_model(model)
    if peft_model is not None:
        return peft_model.active_peft_config
    if not has_own_adapter(model):
        return None
    own: Any = model
    config: PeftConfig = own.peft_config[active_adapter(model)]
    return config


def _method(model: nn.Module) -> str | None:
    config = _config(model)
    # Compared by name, because an older PEFT lacks some members of the enumeration.
    return None if config is None or config.peft_type is None else str(plain(config.peft_type))
