"""TRL's losses read the weight of a model's head outside of that module, where an offloaded one is not loaded."""

from __future__ import annotations

from typing import Any

from zo_hf.offload import offloaded_weights
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.trainer.objectives import kinds_of_trl

#: Trainers of TRL whose losses call `model(..., fused_lm_head=True)`.
_FUSED = {"SFTTrainer", "DPOTrainer", "KTOTrainer"}


def check_head(trainer: Any) -> None:
    """Refuse an offloaded head in a trainer whose loss reads its weight.

    Raises:
        ValueError: it is offloaded; the message names the option and the way out.
    """
    if _FUSED.isdisjoint(kinds_of_trl(type(trainer))):
        return
    inner: Any = base_model(trainer.model)
    head = inner.get_output_embeddings()
    held = () if head is None else [id(parameter) for parameter in head.parameters()]
    name = next((name for name, w in offloaded_weights(trainer.model).items() if id(w.placeholder) in held), None)
    if name is not None:
        raise ValueError(
            f"TRL's losses read {name} outside of its module, and device_map offloads it; give the head, and an embedding that "
            "is tied to it, the device that computes in device_map, and offload only the layers."
        )
