"""The forward gradient (Baydin et al., arXiv 2202.08587; as a control for zeroth order in ZO-Bench, arXiv 2402.11592).

    cᵢ = ∇L(ξ) · zᵢ        ĝ = 1/q · Σᵢ cᵢ · zᵢ

The limit of a two-point estimate for ε → 0, without its rounding and its bias: what is left is the noise of the direction.
One forward pass with tangents (a Jacobian-vector product) gives both L and ∇L · z, and computes about what two passes do,
so it has two entries among the probes and counts as two forward passes. The loss that is logged is L(ξ). ε has no effect.

Cost: q passes with tangents, counted as 2q, one after another. A tangent lives beside every activation, and in the full
subspace beside the weights of one module at a time. Every kernel must have a forward-mode derivative: attention must be
"eager", and quantised layers have none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from zo_hf.estimators.estimator import Estimator
from zo_hf.method import Method
from zo_hf.probes.probe import Probe
from zo_hf.quantization import quantized_layers


class ForwardGradient(Estimator):
    """Exact directional derivatives along `num_directions` random directions."""

    name = "forward_gradient"
    about = Method(
        "forward gradient (2202.08587); ZO-Bench (2402.11592)",
        forwards="2q",
        memory="tangents of the activations",
        needs="attn_implementation='eager', no quantised layers",
    )
    needs_tangents = True

    @classmethod
    def check_model(cls, model: nn.Module) -> None:
        for module in model.modules():
            attention = module.config._attn_implementation if isinstance(module, PreTrainedModel) else None
            if attention not in (None, "eager"):
                raise ValueError(
                    f"zo_estimator={cls.name!r} needs attention with a forward-mode derivative, and {type(module).__name__} "
                    f"has {attention!r}; load it with attn_implementation='eager'."
                )
        if quantized_layers(model):
            raise ValueError(
                f"zo_estimator={cls.name!r} cannot differentiate the quantised layers of {type(model).__name__}; load it "
                "not quantised, or use zo_estimator='two_point'."
            )

    def probes(self) -> list[Probe]:
        """The loss and its derivative along every direction, side by side."""
        return [Probe(i, 0.0, derivative) for i in range(self.num_directions) for derivative in (False, True)]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        return list(losses[1::2])

    def loss(self, losses: Sequence[float]) -> float:
        """At the current point, where all of them are."""
        return losses[0]
