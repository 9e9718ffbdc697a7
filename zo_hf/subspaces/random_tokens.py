"""A forward pass of random tokens, in which the inputs of layers are looked at.

What is measured this way depends on the weights and the seed alone. So neither a log nor a checkpoint holds it, and every
process measures the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.offload import computing_device
from zo_hf.rng import Stream
from zo_hf.rng.draw import draw_half_words
from zo_hf.rng.global_generators import GlobalGenerators
from zo_hf.rng.single_thread import single_thread
from zo_hf.subspaces.evaluation_mode import in_evaluation_mode
from zo_hf.subspaces.peft_methods import base_model

#: Called with a module, its positional inputs and its inputs by keyword, before the module's forward.
Look = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]

#: Shape of the random tokens that the model reads.
_ROWS, _LENGTH = 4, 32


def read_random_tokens(
    model: nn.Module, looks: Sequence[tuple[nn.Module, Look]], stream: Stream, option: str, way_out: str
) -> None:
    """Let the model read random tokens, and call each look before the forward of its module.

    The model is in evaluation mode meanwhile, and the global generators are left as they were. Autocast is off, because
    neither a replay nor the first pass of a run has it.

    Args:
        model: a transformers model that reads `input_ids`.
        looks: the modules to look at, each with the function to call.
        stream: source of the tokens.
        option: the option that needs the pass, for errors.
        way_out: the option to use instead.

    Raises:
        ValueError: the model cannot read tokens alone.
        OutOfMemoryError: there is no memory for the pass.
    """
    inputs = _random_tokens(model, stream, option, way_out)
    device = next(iter(inputs.values())).device
    generators = GlobalGenerators.now(device)

    def leave_autocast(*_: Any) -> None:
        torch.set_autocast_enabled(device.type, False)

    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.callback(generators.restore)
        stack.enter_context(in_evaluation_mode(model))
        for part in list(model.modules())[1:]:  # accelerate puts a context of its own around the model's forward
            stack.callback(part.register_forward_pre_hook(leave_autocast).remove)
        for module, look in looks:
            stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(single_thread())
        try:
            model(**inputs)
        except torch.OutOfMemoryError:  # says nothing about the model, and Trainer knows what to do
            raise
        except Exception as error:
            raise ValueError(
                f"{option} lets the model read random tokens, and this {type(base_model(model)).__name__} cannot read tokens "
                f"alone ({error}); use {way_out}."
            ) from error


def _random_tokens(model: nn.Module, stream: Stream, option: str, way_out: str) -> dict[str, Tensor]:
    """Draw tokens for a model, int64 of shape (rows, length) under each name of its inputs."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel) or inner.main_input_name != "input_ids":
        raise ValueError(
            f"{option} needs a transformers model that reads input_ids, and this is a {type(inner).__name__}; use {way_out}."
        )
    embedding = inner.get_input_embeddings()
    vocabulary = int(inner.config.get_text_config().vocab_size)
    length = min(_LENGTH, int(getattr(inner.config.get_text_config(), "max_position_embeddings", None) or _LENGTH))
    names = ["input_ids", *(["decoder_input_ids"] if inner.config.is_encoder_decoder else [])]
    count = _ROWS * length
    words = {name: draw_half_words(stream, name, 0, 2 * count).to(torch.int64) for name in names}
    device = computing_device(embedding, embedding.weight)
    return {
        name: ((word[:count] << 16 | word[count:]) % vocabulary).view(_ROWS, length).to(device)
        for name, word in words.items()
    }
