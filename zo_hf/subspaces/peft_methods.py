"""What differs between the methods of PEFT: the scale of their weights, and the few that cannot do without gradients.

MeZO (arXiv 2305.17333) has a distance ε and a learning rate for each family of methods, which are the defaults here:

    weights    ε = 1e-3    1e-7 to 1e-6     all weights; of PEFT's methods, those that train weights of the model itself
                                            (LN tuning, which has few and large ones, takes 1e-3: docs/peft.md)
    LoRA       ε = 1e-2    5e-5 to 1e-4     whatever is multiplied with or added to the model's weights or activations
    prompt     ε = 1e-1    1e-3 to 1e-2     vectors in front of the sentence or of its keys and values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.utils import is_peft_available

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Family:
    """Methods whose weights are of one scale.

    Args:
        eps: distance ε of a probe.
        learning_rate: the default one.
    """

    eps: float
    learning_rate: float


WEIGHTS = Family(1e-3, 1e-5)
NORMS = Family(1e-3, 1e-3)
LORA = Family(1e-2, 1e-4)
# Where only the factors that begin at zero move, a rate three times as large is the best (docs/peft.md).
LORA_FROM_ZERO = Family(1e-2, 3e-4)
PROMPT = Family(1e-1, 1e-2)

# By PEFT's names; every other method is like LoRA.
_WEIGHTS = ("BEFT", "SHIRA", "TRAINABLE_TOKENS")
_PROMPT = ("ADAPTION_PROMPT", "CARTRIDGE", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
_WEIGHTS_IN_LAYERS = ("ADAPTION_PROMPT", "LN_TUNING")
# These prepend keys and values, so that the logits are as many as the tokens.
_KEYS_AND_VALUES = ("CARTRIDGE", "PREFIX_TUNING")
_ADD_TO_THE_LOSS = ("SHADOW",)
_NEED_GRADIENTS = {
    "ADALORA": "AdaLoRA chooses its ranks by the gradients of single weights",
    "CPT": "context-aware prompt tuning scales and bounds gradients in a hook of the backward pass",
    "OSF": "orthogonal subspace fine-tuning projects gradients in hooks of the backward pass",
}


def family(model: nn.Module) -> Family:
    """The family of the active adapter."""
    name = _method(model)
    if name == "LN_TUNING":
        return NORMS
    if name in _WEIGHTS:
        return WEIGHTS
    return PROMPT if name in _PROMPT else LORA


def begins_without_effect(model: nn.Module) -> Callable[[str], bool]:
    """Which parameters, by name, the loss does not depend on at first: the factor of a LoRA whose other one begins at zero.

    That is A, and B for an embedding. Moving them is noise at first, and later changes what B has learnt.
    """
    config = _config(model)
    from_zero = _method(model) == "LORA" and getattr(config, "init_lora_weights", None) in (True, "gaussian")
    return lambda name: from_zero and bool({"lora_A", "lora_embedding_B"} & set(name.split(".")))


def refuse_what_needs_gradients(model: nn.Module) -> None:
    """Refuse a method that is more than a loss and weights to move.

    Raises:
        ValueError: the active adapter is of one; the message names it.
    """
    reason = _NEED_GRADIENTS.get(_method(model) or "")
    if reason:
        raise ValueError(f"{reason}, of which there are none; use another method of PEFT, such as LoRA.")


def is_weight_of_the_model(model: nn.Module, name: str) -> bool:
    """Whether a parameter that moves is one of a layer of the model, or of PEFT's copy of one."""
    return _method(model) in _WEIGHTS_IN_LAYERS or "modules_to_save" in name.split(".")


def adds_to_the_loss(model: nn.Module) -> bool:
    """Whether the loss that PEFT returns is not that of its logits alone."""
    return _method(model) in _ADD_TO_THE_LOSS


def tokens_in_front(model: nn.Module) -> int:
    """How many more positions the logits have than the input, because a prompt is put in front of it."""
    config = _config(model)
    if config is None or not config.is_prompt_learning or _method(model) in _KEYS_AND_VALUES:
        return 0
    return int(config.num_virtual_tokens)


def computes_its_prompt(model: nn.Module) -> bool:
    """Whether a network makes the prompt: PEFT saves the prompt without the network, and cannot go on from that."""
    config: Any = _config(model)
    method = _method(model)
    return method == "P_TUNING" or (method == "PREFIX_TUNING" and config.prefix_projection)


def of_active_adapter(model: nn.Module) -> list[Tensor] | None:
    """The parameters that may move where PEFT leaves prompts of inactive adapters trainable; None means all."""
    config, peft_model = _config(model), _peft_model(model)
    if config is None or peft_model is None or not config.is_prompt_learning:
        return None
    others = [f"prompt_encoder.{name}." for name in peft_model.peft_config if name != peft_model.active_adapter]
    return [p for name, p in model.named_parameters() if not any(name.startswith(other) for other in others)]


def _peft_model(model: nn.Module) -> PeftModel | None:
    if not is_peft_available():
        return None
    from peft import PeftModel

    return model if isinstance(model, PeftModel) else None


def _config(model: nn.Module) -> PeftConfig | None:
    peft_model = _peft_model(model)
    return None if peft_model is None else peft_model.active_peft_config


def _method(model: nn.Module) -> str | None:
    config = _config(model)
    # The name, for an older PEFT does not have all of them.
    return (
        None
        if config is None or config.peft_type is None
        else str(getattr(config.peft_type, "value", config.peft_type))
    )
