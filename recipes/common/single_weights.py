"""The losses of a network with one weight moved, for many weights: only what comes after the weight is computed anew.

A weight moved by s changes one channel of its layer's output, y, and leaves everything before it as it is:

    convolution     y[o] += s · x[i] shifted to (a, b)          weight (o, i, a, b)
    norm            y[o] += s · x̂[o]  or  s                     weight or bias o
    linear          y[o] += s · x[i]  or  s                     weight (o, i) or bias o

So a probe costs a copy of y, and the layers after this one. Most weights of a convolutional network are near its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from common.resnet20 import Activations, Layer, Named, ResNet20
from torch import Tensor, nn
from torch.nn import functional as F

from zo_hf import ZerothOrder
from zo_hf.directions import UnitVectors
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import At
from zo_hf.rng import Stream

#: Numbers of a layer's output that are computed at once, so that they stay in a processor's cache.
NUMBERS_AT_ONCE = 1 << 18
#: Pixels in a row of a picture up to which a convolution is a product with a matrix.
SMALL = 2


class SingleWeightLosses:
    """The mean cross entropy of a batch at all probes of a step along coordinates; a loss for `ZerothOrder.estimate`.

    Args:
        zo: the engine, whose directions are coordinates of the network's weights.
        network: its model.
        pictures: (rows, channels, height, width).
        labels: (rows,).
    """

    def __init__(self, zo: ZerothOrder, network: ResNet20, pictures: Tensor, labels: Tensor) -> None:
        assert isinstance(zo.distribution, UnitVectors)
        self._units, self._seed, self._step = zo.distribution, zo.seed, zo.step
        self._network, self._pictures, self._labels = network, pictures, labels
        self._layers = list(network.layers())

    def __call__(self) -> Tensor:
        return F.cross_entropy(self._network(self._pictures), self._labels)

    def losses_at(self, probes: Sequence[Probe], at: At) -> Tensor:
        """Return the losses, float64 (probes,)."""
        losses = torch.empty(len(probes), dtype=torch.float64)
        with at([Probe(0, 0.0)], 0):  # the point itself, where the engine sees which weights are read
            losses[:] = self().double()
        inputs = self._inputs()
        self._make_matrices(inputs)
        places = {index: self._place(probe) for index, probe in enumerate(probes) if probe.scale}
        for name, group in groupby(sorted(places, key=places.__getitem__), key=lambda index: places[index][0]):
            indices = list(group)
            elements = torch.tensor([places[index][1] for index in indices])
            scales = torch.tensor([probes[index].scale for index in indices])
            losses[indices] = self._moved(name, elements, scales, inputs).double()
        return losses

    def _place(self, probe: Probe) -> tuple[str, int]:
        return self._units.place(Stream(self._seed, self._step, probe.direction))

    def _inputs(self) -> dict[str, tuple[int, Activations]]:
        """Return the place and the input of every layer with weights, by name."""
        at, inputs = Activations(self._pictures), {}
        for index, layer in enumerate(self._layers):
            if isinstance(layer, Named):
                inputs[layer.name] = index, at
            at = layer(at)
        return inputs

    def _make_matrices(self, inputs: dict[str, tuple[int, Activations]]) -> None:
        """Replace convolutions of pictures of few pixels, where a product with a matrix takes less time."""
        for name, (index, at) in inputs.items():
            module = self._network.get_submodule(name)
            if isinstance(module, nn.Conv2d) and at.x.shape[-1] <= SMALL:
                self._layers[index] = as_matrix(module, at.x.shape[1:])

    def _moved(
        self, name: str, elements: Tensor, scales: Tensor, inputs: dict[str, tuple[int, Activations]]
    ) -> Tensor:
        """Return the losses, (probes,), with elements of one parameter moved by `scales`, one in each probe."""
        path, _, kind = name.rpartition(".")
        index, at = inputs[path]
        module, after = self._network.get_submodule(path), self._layers[index + 1 :]
        parameter, changes, y = module.get_parameter(kind), output_changes(module, kind, at.x), module(at.x)
        channels = elements // (parameter.numel() // len(parameter))
        losses = []
        for part in torch.arange(len(elements)).split(max(1, NUMBERS_AT_ONCE // y.numel())):
            outputs = y.expand(len(part), *y.shape).clone()
            change = changes[elements[part] % len(changes)]
            outputs[torch.arange(len(part)), :, channels[part]] += scales[part].view(-1, *[1] * (y.ndim - 1)) * change
            losses.append(self._after(after, outputs, at.shortcut))
        return torch.cat(losses)

    def _after(self, layers: Sequence[Layer], outputs: Tensor, shortcut: Tensor | None) -> Tensor:
        """Return the losses, (probes,), given a layer's outputs, (probes, rows, ...), and the layers after it."""
        probes = len(outputs)
        at = Activations(outputs.flatten(0, 1), None if shortcut is None else shortcut.repeat(probes, 1, 1, 1))
        for layer in layers:
            at = layer(at)
        return F.cross_entropy(at.x, self._labels.repeat(probes), reduction="none").view(probes, -1).mean(1)


def as_matrix(convolution: nn.Conv2d, shape: torch.Size) -> Layer:
    """Return a layer that computes a convolution of inputs of a shape, (channels, height, width), with one product."""
    units = torch.eye(shape.numel()).view(-1, *shape)
    outputs = convolution(units)
    matrix = outputs.flatten(1)

    def product(at: Activations) -> Activations:
        return Activations((at.x.flatten(1) @ matrix).view(-1, *outputs.shape[1:]), at.shortcut)

    return product


def output_changes(module: nn.Module, kind: str, x: Tensor) -> Tensor:
    """Return by how much a channel of a layer's output grows with one of the weights that feed it.

    Args:
        module: a convolution without bias, a group norm or a linear layer.
        kind: the parameter's name in the module.
        x: the layer's input.

    Returns:
        (weights, rows, ...); element k of the parameter is weight k modulo their number.
    """
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)  # type: ignore[arg-type]
        size = (x.shape[-1] - 1) // module.stride[0] + 1
        return columns.transpose(0, 1).reshape(columns.shape[1], len(x), size, size)
    if isinstance(module, nn.GroupNorm):
        if kind == "bias":
            return torch.ones_like(x[None, :, 0])
        return F.group_norm(x, module.num_groups, eps=module.eps).transpose(0, 1)
    return x.T if kind == "weight" else torch.ones_like(x[None, :, 0])
