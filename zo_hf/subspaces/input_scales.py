"""Directions divided by the size of the inputs that they meet: the diagonal of K-FAC's input factor.

Martens and Grosse (arXiv 1503.05671) precondition a layer by the second moments of its inputs, A = E[x xᵀ], for a linear
layer y = W·x and δ = ∂ℓ/∂y:

    ∂ℓ/∂W_kj = δ_k · x_j        E[(∂ℓ/∂W_kj)²] ≈ E[δ_k²] · E[x_j²]

A norm has y = w ⊙ x with its normalized input x, so ∂ℓ/∂w_j = δ_j · x_j. A few inputs of a language model are far larger
than all others, and are about the same for all tokens. They take most of a direction's effect, and say nothing about a
token. Here every direction is divided by the size of the inputs:

    s_j = 1 / √max(a_j, 1/100)        a_j = n · meanₜ (x_tj² / ‖xₜ‖²)        mean_j a_j = 1

    matrix, W + B · Vᵀ:   V → s ⊙ V for every column of V
    norm, w + ξ:          z → s ⊙ z

On average, a probe moves the layer's outputs as far as before, so ε keeps its meaning. An embedding that shares its matrix
with the output layer is the exception: what it looks up moves √(mean_j s_j²) times as far. Along the divided directions
the estimate has the mean s² ⊙ ∇ℓ, a gradient preconditioned by A's diagonal. The bound on a_j is for inputs that are nearly
always 0.

The inputs are those of random tokens, see `random_tokens`, and of all calls in which a layer meets them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.rng import Stream
from zo_hf.subspaces.functional import functional_call
from zo_hf.subspaces.layer_inputs import first_input
from zo_hf.subspaces.random_tokens import Look, read_random_tokens

PRECONDITIONERS = ("none", "inputs")

#: Returns what a module's weight multiplies, (..., n), given the module's inputs; None if that is not known.
Factor = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Tensor | None]

_SMALLEST = 1e-2


def measure_scales(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], norms: Mapping[str, nn.Module], stream: Stream
) -> dict[str, Tensor]:
    """Let the model read random tokens, and return s of the weights that its layers multiply inputs by.

    Args:
        model: a transformers model that reads `input_ids`, at the point from which the scales are used.
        layers: the linear layers that read a weight, by the weight's name.
        norms: the module that multiplies its normalized input by a vector, its `weight`, by the vector's name.
        stream: source of the random tokens.

    Returns:
        s, float32 (n,), by name. A weight whose layers have seen no tokens is left out, and so is a vector of another width
        than its module's outputs.

    Raises:
        ValueError: the model cannot read tokens alone.
    """
    moments: dict[str, Moments] = {}
    looks = [(module, _look(moments, name, _input)) for name, modules in layers.items() for module in modules]
    looks += [(module, _look(moments, name, _factor_of_weight)) for name, module in norms.items()]
    read_random_tokens(model, looks, stream, "zo_preconditioner='inputs'", "zo_preconditioner='none'")
    return {name: found.scale() for name, found in moments.items()}


class Moments:
    """Second moments of the inputs that a weight has met, each of length 1.

    Args:
        x: the first inputs, (tokens, n).
    """

    def __init__(self, x: Tensor) -> None:
        self._device, self._tokens = x.device, 0
        self._sums = torch.zeros(x.shape[1], dtype=torch.float64)
        self.add(x)

    def add(self, x: Tensor) -> None:
        """Add inputs of another call, (tokens, n): a layer that stands for several, as ALBERT's, meets those of all."""
        # On the CPU and in float64, so that every kind of device sums alike.
        unit = nn.functional.normalize(x.detach().double().cpu(), dim=1)
        self._sums += unit.square().sum(0)
        self._tokens += len(x)

    def scale(self) -> Tensor:
        """Return s, float32 (n,), on the device of the first inputs."""
        moments = self._sums / self._tokens * len(self._sums)
        return moments.clamp(min=_SMALLEST).rsqrt().float().to(self._device)


def _look(moments: dict[str, Moments], name: str, factor: Factor) -> Look:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = factor(module, args, kwargs)
        if x is None or not x.numel():
            return
        x = x.reshape(-1, x.shape[-1])
        if name in moments:
            moments[name].add(x)
        else:
            moments[name] = Moments(x)

    return look


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return first_input(args, kwargs)


def _factor_of_weight(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the factor of `weight` in a module's output, (..., n), such as a norm's normalized input.

    The output is affine in the vector, as w ⊙ x + b, or as (1 + w) ⊙ x in Gemma. So its change from weight 0 to weight 1
    is x. None if the output is no tensor of the vector's width.
    """
    weight, device = module._parameters["weight"], first_input(args, kwargs).device
    assert weight is not None

    def output(value: float) -> Any:
        # All parameters, because those of an offloaded module are not here yet.
        parameters = {
            name: torch.full(p.shape, value if name == "weight" else 0.0, dtype=p.dtype, device=device)
            for name, p in module._parameters.items()
            if p is not None
        }
        return functional_call(module, parameters, args, kwargs)

    with_one = output(1.0)
    if not isinstance(with_one, Tensor) or with_one.shape[-1:] != weight.shape:
        return None
    return with_one - output(0.0)
