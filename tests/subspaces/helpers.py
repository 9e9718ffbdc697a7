"""What the suites over all subspaces share: models made ready, an optimizer that suits, θ(ξ) written a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.conftest import CAUSAL_MODELS, causal_batch, tiny_bert
from tests.quantized_models import decoded, dequantized, quantize
from zo_hf.directions import GAUSSIAN, Distribution
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.rng import Purpose, Stream, draw_slice
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import SUBSPACES, Core, Folded, Full, LowRank, Scales, Subspace

# Of the distributions, one moves small weights, which these have not.
ARE_OFFSETS = [name for name in SUBSPACES if name not in ("full", "adapter")]


def draws_for(distribution: str, subspace: str) -> bool:
    """Whether directions from this distribution can be drawn in this subspace."""
    return distribution != "sparse" or subspace not in ARE_OFFSETS


EVERY_SUBSPACE = pytest.mark.parametrize("subspace", list(SUBSPACES))
# What moves the weights of any model; scales are those of quantized layers and of nothing else.
UNQUANTISED = [name for name in SUBSPACES if name != "scales"]
MODELS = {**CAUSAL_MODELS, "bert": tiny_bert}
EVERY_MODEL = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def loss_of(model: Any, batch: Mapping[str, Any], **options: Any) -> ModelLoss:
    """The model's own loss of a batch, as a Trainer gives it to the engine; `options` are those of `ModelLoss`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ModelLoss(model, base, batch, lambda inputs: model(**inputs).loss, **options)


def prepared(subspace: str, model: nn.Module, targets: str | list[str] = "all-linear", rank: int = 2) -> nn.Module:
    """The model as the subspace expects it.

    For "adapter" it is wrapped by PEFT with LoRA, B away from zero; for "scales" its linear layers are quantized.
    """
    if subspace == "scales":
        return quantize(model, only=None if targets == "all-linear" else targets)
    if subspace != "adapter":
        return model
    if targets == "all-linear" and hasattr(model.config, "num_local_experts"):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]  # LoRA on experts has tests of its own
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dtype = next(model.parameters()).dtype
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4, target_modules=targets)).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model


def with_scales(subspace: str, model: nn.Module) -> nn.Module:
    """Any module, its linear layers quantized if it is their scales that move."""
    return quantize(model) if subspace == "scales" else model


def sgd(zo: ZerothOrder, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Plain descent for any subspace, prepared."""
    groups = zo.coordinates(weight_decay)
    if isinstance(zo.subspace, Full):
        return zo.prepare(SeededSGD(groups, zo.subspace, lr=lr))
    return zo.prepare(torch.optim.SGD(groups, lr=lr))


def batch_for(model: nn.Module, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A batch with the labels that the model wants."""
    batch = causal_batch(rows, seed=seed)
    config = model.config
    if config.model_type == "bert":
        batch["labels"] = torch.arange(rows) % 2
    return batch


def exact_loss(call: Callable[..., Mapping], batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in the dtype of the logits; transformers' own rounds float64 logits to float32."""
    labels = batch["labels"]
    logits = call(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@contextmanager
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, RMS norms and routers that compute in float32 leave float64 alone, so that differences are exact."""
    draw_slice(Stream(0), "w", 0, 1, GAUSSIAN)  # its table is made once, in float32
    to_float, to = torch.Tensor.float, torch.Tensor.to

    def float_(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor)

    def to_(tensor: Tensor, *args, **kwargs) -> Tensor:
        narrows = tensor.dtype == torch.float64 and torch.float32 in (*args[:1], kwargs.get("dtype"))
        return tensor if narrows else to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", float_)
        patch.setattr(torch.Tensor, "to", to_)
        yield


def direction(
    subspace: Subspace, step: int = 0, index: int = 0, distribution: Distribution = GAUSSIAN
) -> dict[str, Tensor]:
    """z over all coordinates, drawn tensor by tensor."""
    stream = Stream(subspace.seed, step, index)
    return {
        name: distribution.draw_slice(stream, name, 0, c.detach().reshape(-1)).view(c.shape).to(c.dtype)
        for name, c in subspace.coordinates.items()
    }


def plain(model: nn.Module) -> nn.Module:
    """The model itself, or, where layers are quantized, a copy with the weights that these stand for."""
    return dequantized(model, next(p.dtype for p in model.parameters() if p.is_floating_point()))


def move_off_the_origin(subspace: Subspace, size: float = 0.02) -> None:
    """Coordinates that are apart from the weights as they are in the middle of a run, not at zero."""
    if isinstance(subspace, Folded):
        generator = torch.Generator().manual_seed(5)
        for coordinate in subspace.coordinates.values():
            coordinate.data.normal_(std=size, generator=generator)
        subspace.coordinates_changed()


def parameters_at(subspace: Subspace, xi: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ(ξ) by parameter name, differentiable; for coordinates that are the parameters themselves, ξ."""
    if isinstance(subspace, Scales):
        layers = {site.name: site.layer for site in subspace.sites}
        return {name: decoded(layers[name]).to(c.dtype) * c.exp()[:, None] for name, c in xi.items()}
    if not isinstance(subspace, LowRank):
        return dict(xi)
    named = dict(subspace.model.named_parameters())
    conv1d = {f"{name}.weight" for name, module in subspace.model.named_modules() if isinstance(module, Conv1D)}
    moved = {}
    for name, coordinate in xi.items():
        weight = named[name].detach()
        if name not in subspace.factored:
            moved[name] = weight + coordinate
            continue
        change = left(subspace, name, coordinate) @ basis(subspace, name).t()
        moved[name] = weight + (change.t() if name in conv1d else change.view(weight.shape))
    return moved


def basis(subspace: LowRank, name: str, drawn_at: int = 0) -> Tensor:
    """V / √r of a matrix, or the orthonormal V of a core, drawn here and not taken from the subspace."""
    n, dtype = subspace.basis(name).shape[0], subspace.coordinates[name].dtype
    if isinstance(subspace, Core):
        return _orthonormal(subspace, name, n, drawn_at).to(dtype)
    return _normal(subspace, name, n, drawn_at).to(dtype) / subspace.rank**0.5


def left(subspace: LowRank, name: str, coordinate: Tensor, drawn_at: int = 0) -> Tensor:
    """What stands to the left of Vᵀ: the coordinate itself, or √(mn)/r · U · S for a core S."""
    if not isinstance(subspace, Core):
        return coordinate
    m, n = subspace.factored[name].matrix_shape
    u = _orthonormal(subspace, f"{name}/left", m, drawn_at).to(coordinate.dtype)
    return (m * n) ** 0.5 / subspace.rank * u @ coordinate


def _normal(subspace: LowRank, name: str, rows: int, drawn_at: int) -> Tensor:
    stream = Stream(subspace.seed, drawn_at, purpose=Purpose.BASIS)
    return draw_slice(stream, name, 0, rows * subspace.rank, GAUSSIAN).view(rows, subspace.rank)


def _orthonormal(subspace: LowRank, name: str, rows: int, drawn_at: int) -> Tensor:
    """By Gram and Schmidt, which leaves the diagonal of R positive."""
    columns: list[Tensor] = []
    for column in _normal(subspace, name, rows, drawn_at).double().unbind(1):
        for other in columns * 2:  # twice is enough
            column = column - (column @ other) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


def gradient_in_coordinates(subspace: Subspace, loss: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """Autograd's ∂L/∂ξ of `loss(parameters)` at the current coordinates."""
    dtype = next(p.dtype for p in subspace.model.parameters() if p.is_floating_point())
    xi = {name: c.detach().to(dtype).clone().requires_grad_() for name, c in subspace.coordinates.items()}
    gradients = torch.autograd.grad(loss(parameters_at(subspace, xi)), list(xi.values()), allow_unused=True)
    return {
        name: torch.zeros_like(c) if gradient is None else gradient
        for (name, c), gradient in zip(xi.items(), gradients, strict=True)
    }
