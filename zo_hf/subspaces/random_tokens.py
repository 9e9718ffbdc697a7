"""A forward pass of random tokens that measures the inputs of layers.

The measurement depends only on the weights and the seed. So neither a log nor a checkpoint holds it, and every process
measures the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

#: Rows of random tokens that the model reads.
_ROWS = 4

#: Length of a row, if the model reads that many tokens.
LENGTH = 32


def reads_tokens(model: nn.Module) -> bool:
    """Return True for a transformers model whose main input is token ids."""
    inner = base_model(model)
    return isinstance(inner, PreTrainedModel) and inner.main_input_name == "input_ids"


def check_reads_tokens(model: nn.Module, option: str, way_out: str) -> None:
    """Refuse a model that reads no token ids.

    Raises:
        ValueError: it is one; the message names the option and the way out.
    """
    if not reads_tokens(model):
        raise ValueError(
            f"{option} needs a transformers model that reads input_ids, and this is a {type(base_model(model)).__name__}; "
            f"use {way_out}."
        )


def read_random_tokens(
    model: nn.Module, looks: Sequence[tuple[nn.Module, Look]], stream: Stream, option: str, way_out: str
) -> None:
    """Let the model read random tokens, and call each look before the forward of its module.

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
    check_reads_tokens(model, option, way_out)
    read_tokens(model, random_tokens(model, _ROWS, LENGTH, stream), looks, option, way_out)


def read_tokens(
    model: nn.Module, inputs: Mapping[str, Tensor], looks: Sequence[tuple[nn.Module, Look]], option: str, way_out: str
) -> None:
    """Let the model read tokens, and call each look before the forward of its module.

    Args:
        model: a transformers model that reads `input_ids`.
        inputs: token ids, int64 (rows, length), by the names of the model's inputs.
        looks: the modules to look at, each with the function to call.
        option: the option that needs the pass, for errors.
        way_out: the option to use instead.

    Raises:
        ValueError: the model cannot read tokens alone.
        OutOfMemoryError: there is no memory for the pass.
    """
    failures: list[Exception] = []  # of looks, which a model that cannot read tokens must not be blamed for

    def guarded(look: Look) -> Look:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            try:
                look(module, args, kwargs)
            except Exception as error:
                failures.append(error)
                raise

        return call

    with ExitStack() as stack:
        stack.enter_context(without_trace(model))
        for module, look in looks:
            stack.callback(module.register_forward_pre_hook(guarded(look), with_kwargs=True).remove)
        with refusing(model, option, way_out, failures):
            model(**inputs)


@contextmanager
def refusing(model: nn.Module, option: str, way_out: str, failures: Sequence[Exception] = ()) -> Iterator[None]:
    """Enter a context in which an error is the model's, unless memory has run out or there are `failures` of others.

    Raises:
        ValueError: the model cannot read tokens alone.
    """
    try:
        yield
    except Exception as error:
        if failures or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{option} lets the model read random tokens, and this {type(base_model(model)).__name__} cannot read tokens "
            f"alone ({error}); use {way_out}."
        ) from error


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Enter a context for forward passes that give the same bits in every process, and change nothing.

    The model is in evaluation mode meanwhile, and the global generators are left as they were. Autocast is off, because
    neither a replay nor the first pass of a run has it.
    """
    inner = base_model(model)
    assert isinstance(inner, PreTrainedModel)
    embedding = inner.get_input_embeddings()
    device = computing_device(embedding, embedding.weight)
    generators = GlobalGenerators.now(device)

    def leave_autocast(*_: Any) -> None:
        torch.set_autocast_enabled(device.type, False)

    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.callback(generators.restore)
        stack.enter_context(in_evaluation_mode(model))
        for part in list(model.modules())[1:]:  # accelerate puts a context of its own around the model's forward
            stack.callback(part.register_forward_pre_hook(leave_autocast).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(single_thread())
        yield


def random_tokens(model: nn.Module, rows: int, length: int, stream: Stream) -> dict[str, Tensor]:
    """Draw tokens for a model that reads them.

    Returns:
        int64 of shape (rows, length) under each name of the model's inputs; shorter rows if the model reads no longer ones.
    """
    inner = base_model(model)
    assert isinstance(inner, PreTrainedModel)
    embedding, text = inner.get_input_embeddings(), inner.config.get_text_config()
    length = min(length, int(getattr(text, "max_position_embeddings", None) or length))
    names = ["input_ids", *(["decoder_input_ids"] if inner.config.is_encoder_decoder else [])]
    count = rows * length
    words = {name: draw_half_words(stream, name, 0, 2 * count).to(torch.int64) for name in names}
    device = computing_device(embedding, embedding.weight)
    return {
        name: ((word[:count] << 16 | word[count:]) % int(text.vocab_size)).view(rows, length).to(device)
        for name, word in words.items()
    }
