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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import GAUSSIAN
from zo_hf.rng import Stream, draw_slice
from zo_hf.subspaces.layer_inputs import first_input
from zo_hf.subspaces.random_tokens import Look, read_random_tokens

BASES = ("random", "activation")


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
    bases: dict[str, Tensor] = {}
    looks = [(module, _look(bases, name, rank, stream)) for name, modules in layers.items() for module in modules]
    read_random_tokens(model, looks, stream, "zo_basis='activation'", "zo_basis='random'")
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


def _look(bases: dict[str, Tensor], name: str, rank: int, stream: Stream) -> Look:
    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = first_input(args, kwargs)
        x = x.reshape(-1, x.shape[-1])
        if name in bases or len(x) < rank or rank > x.shape[-1]:
            return
        noise = draw_slice(stream, name, 0, len(x) * rank, GAUSSIAN).view(len(x), rank)
        bases[name] = basis_of(x, rank, noise)

    return measure
