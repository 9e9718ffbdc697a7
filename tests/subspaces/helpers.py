"""What the suites over all subspaces share: models made ready, an optimizer that suits, θ(ξ) written a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.conftest import CAUSAL_MODELS, causal_batch, tiny_bert
from zo_hf.directions import GAUSSIAN, Distribution, Purpose, Stream, draw_slice
from zo_hf.optimizers import SeededSGD
from zo_hf.subspaces import SUBSPACES, Full, LowRank, Subspace
from zo_hf.zeroth_order import ZerothOrder

EVERY_SUBSPACE = pytest.mark.parametrize("subspace", list(SUBSPACES))
MODELS = {**CAUSAL_MODELS, "bert": tiny_bert}
EVERY_MODEL = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def prepared(subspace: str, model: nn.Module, targets: str | list[str] = "all-linear", rank: int = 2) -> nn.Module:
    """The model as the subspace expects it: for "adapter" wrapped by PEFT with LoRA, B away from zero."""
    if subspace != "adapter":
        return model
    if targets == "all-linear" and hasattr(model.config, "num_local_experts"):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]  # LoRA on experts is refused
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
        name: draw_slice(stream, name, 0, c.numel(), distribution).view(c.shape).to(c.dtype)
        for name, c in subspace.coordinates.items()
    }


def parameters_at(subspace: Subspace, xi: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ(ξ) by parameter name, differentiable; for coordinates that are the parameters themselves, ξ."""
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
        change = coordinate @ basis(subspace, name).t()
        moved[name] = weight + (change.t() if name in conv1d else change.view(weight.shape))
    return moved


def basis(subspace: LowRank, name: str, drawn_at: int = 0) -> Tensor:
    """V / √r of a matrix, drawn here and not taken from the subspace."""
    n = subspace.basis(name).shape[0]
    stream = Stream(subspace.seed, drawn_at, purpose=Purpose.BASIS)
    v = draw_slice(stream, name, 0, n * subspace.rank, GAUSSIAN).view(n, subspace.rank) / subspace.rank**0.5
    return v.to(subspace.coordinates[name].dtype)


def gradient_in_coordinates(subspace: Subspace, loss: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """Autograd's ∂L/∂ξ of `loss(parameters)` at the current coordinates."""
    xi = {name: c.detach().clone().requires_grad_() for name, c in subspace.coordinates.items()}
    gradients = torch.autograd.grad(loss(parameters_at(subspace, xi)), list(xi.values()), allow_unused=True)
    return {
        name: torch.zeros_like(c) if gradient is None else gradient
        for (name, c), gradient in zip(xi.items(), gradients, strict=True)
    }
