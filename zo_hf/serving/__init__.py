"""A serving engine as the forward pass: servers evaluate the population, as LoRA adapters of one base model."""

from zo_hf.serving.errors import ServingError
from zo_hf.serving.model import ServedModel, Servers

__all__ = ["ServedModel", "Servers", "ServingError"]
