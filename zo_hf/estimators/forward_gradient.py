"""The forward gradient (Baydin et al., arXiv 2202.08587; as a control for zeroth order in ZO-Bench, arXiv 2402.11592).

    cᵢ = ∇L(ξ) · zᵢ        ĝ = 1/q · Σᵢ cᵢ · zᵢ

This is the limit of a two-point estimate for ε → 0, free of rounding error and bias: only the noise of the direction
remains. One forward pass with tangents (a Jacobian-vector product) gives both L and ∇L · z. It computes about as much
as two passes, so it has two entries among the probes and counts as two forward passes. The logged loss is L(ξ), and ε
has no effect.

Cost: q passes with tangents, counted as 2q, one after another. Every activation has a tangent in memory, and in the
full subspace so have the weights of one module at a time. Groups of rows with directions of their own have tangents of
their own, in the same pass, which gives the exact derivative of each group's share. Every kernel must have a
forward-mode derivative: attention must be "eager", and quantized layers are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method
from zo_hf.quantization import quantized_layers


class ForwardGradient(Estimator):
    """Exact directional derivatives along `num_directions` random directions."""

    name = "forward_gradient"
    about = Method(
        "forward gradient (2202.08587); ZO-Bench (2402.11592)",
        forwards="2q",
        memory="tangents of the activations",
        needs="attn_implementation='eager', no quantized layers",
    )
    needs_tangents = True

    @classmethod
    def check_model(cls, model: nn.Module) -> None:
        for module in model.modules():
            attention = module.config._attn_implementation if isinstance(module, PreTrainedModel) else None
            if attention not in (None, "eager"):
                raise ValueError(
                    f"zo_estimator={cls.name!r} needs attention with a forward-mode derivative, but "
                    f"{type(module).__name__} has {attention!r}; load it with attn_implementation='eager'."
                )
        if quantized_layers(model):
            raise ValueError(
                f"zo_estimator={cls.name!r} cannot differentiate the quantized layers of {type(model).__name__}; load "
                "the model without quantization, or use zo_estimator='two_point'."
            )

    def probes(self) -> list[Probe]:
        """Return the loss and its derivative for every direction, side by side."""
        return [Probe(i, 0.0, derivative) for i in range(self.num_directions) for derivative in (False, True)]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        return list(losses[1::2])

    def loss(self, losses: Sequence[float]) -> float:
        """Return the loss at the current point, which is the same in all probes."""
        return losses[0]
