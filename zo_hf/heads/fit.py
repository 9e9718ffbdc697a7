"""A classification head that is fitted to features, before a run moves the model.

A fresh head knows nothing: its rows' gradients nearly cancel, and hundreds of forward passes of zeroth-order steps may teach it
nothing. Forward passes of single batches give the features of their rows, and linear discriminant analysis gives a head from
them in closed form. Fitting the head first, and the model afterwards, is what Kumar et al. (arXiv 2202.10054) advise for
backpropagation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.heads.discriminant import Discriminant, fit_discriminant
from zo_hf.subspaces.evaluation_mode import in_evaluation_mode
from zo_hf.subspaces.peft_methods import is_peft

logger = logging.getLogger(__name__)

SINGLE_LABEL = "single_label_classification"
#: Positions have codes of two digits from 1 to this number, which are exact in bfloat16.
BASE = 256


@dataclass(frozen=True)
class FittedHead:
    """The result of `fit_head`.

    Attributes:
        name: name of the layer in the model.
        rows: number of rows (of tokens, for a classifier of tokens) that it was fitted to.
        forward_passes: forward passes of a batch that this took.
        accuracy: the accuracy in cross validation: of heads fitted without the rows that they answered.
        loss: the cross entropy in the same cross validation.
    """

    name: str
    rows: int
    forward_passes: int
    accuracy: float
    loss: float


def fit_head(model: nn.Module, batches: Iterable[Mapping[str, Any]], max_rows: int = 2000) -> FittedHead:
    """Set the weights of a classification head by linear discriminant analysis of the features of labeled rows.

    The head is the linear layer whose outputs are the logits, of a classifier of rows, of tokens or of images. Call it before
    training, with the batches that you train on. Nothing but the head changes. With several processes, each gives its own
    batches, and all get the same head.

    Args:
        model: a classifier whose output has `logits`, (rows, classes) or (rows, tokens, classes).
        batches: arguments of the model, with class numbers in `labels`: integers, (rows,) or (rows, tokens). -100 is left out.
        max_rows: number of labels after which a process reads no further batch.

    Raises:
        ValueError: no linear layer gives the logits; the head is quantized, sharded or offloaded; the labels are not class
            numbers, or the loss is not one of single classes; or a class has fewer than two rows.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1.")
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem not in (None, SINGLE_LABEL):
        raise ValueError(
            f"fit_head gives a head for one class in a row, and the model's config has problem_type={problem!r}; train its "
            f"fresh head as it is, or set problem_type={SINGLE_LABEL!r}."
        )
    own: _Share | Exception
    try:
        # Compiled code does not call the hooks by which the head is found.
        with torch.no_grad(), in_evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            own = _share(model, batches, max_rows)
    except Exception as error:  # the other processes wait for this one
        own = error
    share = _from_all_processes(own)
    head = model.get_submodule(share.name)
    assert isinstance(head, nn.Linear)
    everyone, targets = share.features, share.labels
    _check_classes(targets, head.out_features)
    found, scores = fit_discriminant(everyone, targets, head.out_features, head.bias is not None)
    _write(head, found)
    if is_peft(model) and ".modules_to_save." not in share.name:
        logger.warning(
            "the files of an adapter do not hold %s, which fit_head has set; name the head in the adapter's modules_to_save and "
            "not in target_modules, or save the merged model",
            share.name,
        )
    return FittedHead(
        name=share.name,
        rows=len(targets),
        forward_passes=share.passes,
        accuracy=(scores.argmax(1) == targets).double().mean().item(),
        loss=nn.functional.cross_entropy(scores, targets).item(),
    )


@dataclass(frozen=True)
class _Share:
    """The share of one process: its head's name ("" without a batch), features, labels and number of forward passes."""

    name: str
    features: Tensor
    labels: Tensor
    passes: int


def _share(model: nn.Module, batches: Iterable[Mapping[str, Any]], max_rows: int) -> _Share:
    """Return the features and labels of this process's batches."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    head, passes = None, 0
    for batch in tqdm(batches, desc="features of rows", leave=False):
        classes, inputs = _divided(model, batch)
        if head is None:
            head, passes = _find_head(model, inputs)
        kept = classes != IGNORED
        features.append(_features(model, head, inputs, classes)[kept].double().cpu())
        labels.append(classes[kept].cpu())
        passes += 1
        if sum(map(len, labels)) >= max_rows:
            break
    if head is None:
        return _Share("", torch.empty(0), torch.empty(0, dtype=torch.long), 0)
    name = next(name for name, module in model.named_modules() if module is head)
    found = _Share(name, torch.cat(features), torch.cat(labels), passes)
    if not found.features.isfinite().all():
        raise ValueError(
            f"the inputs of the head {name} have numbers that are infinite or not a number; check the weights of the model, or load "
            "it in bfloat16 or float32."
        )
    return found


def _divided(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return a batch's labels and its other arguments, on the device of the model's first parameter that has one."""
    device = next((each.device for each in model.parameters() if each.device.type != "meta"), None)
    if device is None:
        raise ValueError(
            "fit_head needs the weights of the model, and all of them are on the meta device: load them first."
        )
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels = inputs.pop("labels", None)
    if labels is None and "label" in inputs:
        raise ValueError("fit_head reads class numbers from `labels`, and a batch has `label`; rename it.")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            "fit_head needs class numbers as a tensor of integers in every batch's `labels`; train the fresh head of another "
            "task as it is."
        )
    return labels.long(), inputs


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits of a forward pass, (..., classes)."""
    outputs = model(**inputs)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError("fit_head needs a classifier: a model whose output has `logits` of two classes or more.")
    return logits


def _find_head(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[nn.Linear, int]:
    """Return the linear layer whose outputs are the logits, and how many forward passes the search took.

    A layer is the head if the model's logits are the numbers that a hook puts in place of the layer's outputs.
    """
    classes, passes = _logits(model, inputs).shape[-1], 1
    adapted: str | None = None
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and module.out_features == classes:
            passes += 1
            if _positions(model, module, inputs) is not None:
                _check_head(module)
                return module, passes
            adapted = adapted or (name.removesuffix(".base_layer") if name.endswith(".base_layer") else None)
    if adapted is not None:
        raise ValueError(
            f"fit_head sets a linear layer alone, and {adapted} has an adapter; name it in the adapter's modules_to_save and not in "
            "target_modules."
        )
    raise ValueError(
        f"no linear layer of {type(model).__name__} has the logits as its outputs, so fit_head has nothing to fit; train the "
        "fresh head as it is."
    )


def _positions(model: nn.Module, layer: nn.Linear, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Run a forward pass in which a layer's outputs are replaced by numbers that tell their position.

    Returns:
        The layer's inputs, (rows, positions, features), and the positions that became logits, (rows, ...); None if the logits
        are other numbers.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def replaced(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs_of_layer = arguments[0].flatten(1, -2) if arguments[0].ndim > 2 else arguments[0][:, None]
        codes = _codes(inputs_of_layer.shape[1]).to(output.device)
        seen[:] = [(inputs_of_layer, codes)]
        digits = torch.zeros(len(codes), output.shape[-1], device=output.device, dtype=output.dtype)
        digits[:, 0], digits[:, 1] = 1 + codes % BASE, 1 + codes // BASE
        return digits.expand(len(output), -1, -1).reshape(output.shape)

    handle = layer.register_forward_hook(replaced)
    try:
        digits = _logits(model, inputs).double()
    finally:
        handle.remove()
    if not seen or len(digits) != len(seen[0][0]):
        return None
    inputs_of_layer, codes = seen[0]
    found = digits[..., 0] - 1 + BASE * (digits[..., 1] - 1)
    codes, positions = codes.to(found.device).sort()
    place = torch.searchsorted(codes.double(), found).clamp(max=len(codes) - 1)
    return (inputs_of_layer, positions[place]) if torch.equal(codes[place].double(), found) else None


def _codes(count: int) -> Tensor:
    """Return different numbers for positions, (count,), such that the mean of several is none of them, unlike 0, 1, 2, ...

    Raises:
        ValueError: there are more positions than codes.
    """
    if count > BASE**2:
        raise ValueError(
            f"fit_head tells {BASE**2} positions of a row apart, and there are {count}; shorten the rows."
        )
    return torch.randperm(BASE**2, generator=torch.Generator().manual_seed(0))[:count]


def _features(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Return the inputs of the head that became the logits, of the shape of the labels and one more dimension of features."""
    found = _positions(model, head, inputs)
    if found is None:
        raise ValueError(
            "the logits of a later batch are not the outputs of the layer that gave those of the first one."
        )
    features, positions = found
    if positions.shape != labels.shape:
        raise ValueError(
            f"fit_head needs a label for every row of logits: `labels` has the shape {tuple(labels.shape)}, and the logits have "
            f"{tuple(positions.shape)} before the dimension of classes."
        )
    chosen = positions.reshape(len(positions), -1, 1).expand(-1, -1, features.shape[-1])
    return features.gather(1, chosen).reshape(*labels.shape, features.shape[-1])


def _check_head(head: nn.Linear) -> None:
    """Refuse a head that cannot be written.

    Raises:
        ValueError: it is quantized, sharded or offloaded.
    """
    weight = head.weight
    if type(weight.data) is not Tensor or weight.device.type == "meta" or not weight.is_floating_point():
        raise ValueError(
            "fit_head cannot write a head that is sharded, offloaded or quantized: fit it before you shard or offload the model, "
            "and name the head in the quantization config's list of modules to skip."
        )


def _check_classes(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no classes of the head, and classes with fewer than two labels.

    Raises:
        ValueError: there are some.
    """
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"`labels` has the numbers {labels.min()} to {labels.max()}, but the head has the classes 0 to {num_classes - 1}; load "
            "the model with the right num_labels."
        )
    few = [index for index, count in enumerate(torch.bincount(labels, minlength=num_classes).tolist()) if count < 2]
    if few:
        raise ValueError(
            f"fit_head needs two rows or more of every class, and there are fewer of class {few[0]} among {len(labels)}; raise "
            "max_rows, or give batches that have all classes."
        )


def _from_all_processes(own: _Share | Exception) -> _Share:
    """Return the shares of all processes as one, in the order of their ranks.

    Raises:
        ValueError: no process has a batch, or another process failed.
        Exception: what this process failed with.
    """
    everyone: list[Any] = [own if isinstance(own, _Share) else str(own)]
    if dist.is_available() and dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, everyone[0])
    if isinstance(own, Exception):
        raise own
    for rank, share in enumerate(everyone):
        if isinstance(share, str):
            raise ValueError(f"fit_head failed on rank {rank}, so it set no head on any other: {share}")
    shares = [share for share in everyone if share.name]
    if not shares:
        raise ValueError("fit_head got no batch: give it labeled batches, such as trainer.get_train_dataloader().")
    features, labels = (torch.cat([getattr(share, part) for share in shares]) for part in ("features", "labels"))
    return _Share(shares[0].name, features, labels, max(share.passes for share in shares))


def _write(head: nn.Linear, found: Discriminant) -> None:
    """Write the head's weights; with several processes, those that the first one has computed.

    Raises:
        ValueError: they are too large for the head's dtype.
    """
    values = [(found.weight, found.bias)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(values)
    weight, bias = (value.to(head.weight.dtype) for value in values[0])
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(
            f"the fitted head has numbers that are too large for {weight.dtype}; load the model in bfloat16 or float32."
        )
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)
