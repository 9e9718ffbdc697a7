"""Bases of low-rank factors that span inputs of their layers, after AGZO (Lin et al., arXiv 2601.17261).

The gradient of a linear layer is Σₜ δₜ · xₜᵀ over its inputs x, so its rows lie in the span of these inputs. A random V
holds r/n of their energy, and a V that is made of inputs holds most of it:

    V/√r = E / √(meanₜ ‖xₜᵀE‖²)      E = orth(Xᵀ · G)      X: (tokens, n), inputs of the layer, each of length 1
                                      E: (n, r)             G: (tokens, r), standard normal from the seed

The divisor lets a probe move the layer's outputs as far, on average, as it does with a random V. Therefore ε keeps its
meaning, and so does a learning rate that is safe.

AGZO takes the inputs of the batch. Here the model reads random tokens: their inputs span about the same directions, and
V depends on the weights and the seed alone. So neither a log nor a checkpoint holds it, and every process has the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.directions import GAUSSIAN
from zo_hf.offload import computing_device
from zo_hf.rng import Stream, draw_slice
from zo_hf.rng.draw import draw_half_words
from zo_hf.rng.global_generators import GlobalGenerators
from zo_hf.rng.single_thread import single_thread
from zo_hf.subspaces.evaluation_mode import in_evaluation_mode
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.subspaces.subspace import first_input

BASES = ("random", "activation")

#: Shape of the random tokens that the model reads.
_ROWS, _LENGTH = 4, 32


def measure_bases(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], rank: int, stream: Stream
) -> dict[str, Tensor]:
    """Let the model read random tokens, and return bases made of the inputs of its layers.

    Args:
        model: a transformers model that reads `input_ids`, at the point from which the bases are used.
        layers: the linear layers that read a weight, by the weight's name.
        rank: r.
        stream: source of the random tokens and of G.

    Returns:
        V/√r, float32 (n, r), by name. A weight whose layers have seen fewer than r inputs is left out.

    Raises:
        ValueError: the model cannot read tokens alone.
    """
    inputs = _random_tokens(model, stream)
    bases: dict[str, Tensor] = {}
    device = next(iter(inputs.values())).device
    generators = GlobalGenerators.now(device)
    with ExitStack() as stack:
        stack.callback(generators.restore)
        stack.enter_context(in_evaluation_mode(model))
        for name, modules in layers.items():
            for module in modules:
                handle = module.register_forward_pre_hook(_hook(bases, name, rank, stream), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(single_thread())
        try:
            model(**inputs)
        except Exception as error:
            raise ValueError(
                f"zo_basis='activation' lets the model read random tokens, and this {type(base_model(model)).__name__} cannot "
                f"read tokens alone ({error}); use zo_basis='random'."
            ) from error
    return bases


def basis_of(x: Tensor, rank: int, noise: Tensor) -> Tensor:
    """Return V/√r for a layer with the inputs `x`.

    Args:
        x: inputs, (tokens, n).
        rank: r.
        noise: G, (tokens, r).

    Returns:
        float32 of shape (n, r), on the device of `x`.
    """
    # On the CPU and in float64, so that every kind of device orthogonalizes alike.
    unit = nn.functional.normalize(x.detach().double().cpu(), dim=1)
    basis, _ = torch.linalg.qr(unit.t() @ noise.double().cpu())
    scale = (unit @ basis).square().sum(1).mean().sqrt()
    return (basis / scale).float().to(x.device)


def _hook(bases: dict[str, Tensor], name: str, rank: int, stream: Stream) -> Callable[..., None]:
    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        x = x.reshape(-1, x.shape[-1])
        if name in bases or len(x) < rank or rank > x.shape[-1]:
            return
        noise = draw_slice(stream, name, 0, len(x) * rank, GAUSSIAN).view(len(x), rank)
        bases[name] = basis_of(x, rank, noise)

    return measure


def _random_tokens(model: nn.Module, stream: Stream) -> dict[str, Tensor]:
    """Draw tokens for a model, int64 of shape (rows, length) under each name of its inputs."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel) or inner.main_input_name != "input_ids":
        raise ValueError(
            f"zo_basis='activation' needs a transformers model that reads input_ids, and this is a "
            f"{type(inner).__name__}; use zo_basis='random'."
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
