"""Forward passes without a key-value cache, which a probe would fill and never read.

The configs of transformers ask for a cache, and Trainer turns it off. An engine without a Trainer does it here. For
Llama-8B and 16 rows of 512 tokens, the cache of both probes would be as large as all other activations of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def configs_with_cache(model: nn.Module) -> list[PretrainedConfig]:
    """Return the configs of a model and its parts that have `use_cache`."""
    whole = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    every = {id(config): config for one in whole for config in (one, one.get_text_config())}
    return [config for config in every.values() if "use_cache" in config.__dict__]


@contextmanager
def without_cache(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    """Set `use_cache` of these configs to False while the context is open."""
    before = [(config, config.use_cache) for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value
