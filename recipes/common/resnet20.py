"""ResNet-20 for small pictures (He et al., arXiv 1512.03385, section 4.2), as a row of layers.

A convolution of 3 x 3 with 16 channels, three stages of three blocks with 16, 32 and 64 channels, the mean over pixels, and
a linear layer. A shortcut to more channels takes every second pixel and fills up with zeros, the paper's option A. With one
input channel it has 269,434 weights.

Norms are group norms of eight groups in place of batch norms. A batch norm in evaluation mode has the statistics that
forward passes in training mode have gathered, and a method of forward passes in evaluation mode gathers none. In training
mode it would write its statistics in every probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


@dataclass(frozen=True)
class Activations:
    """The output of a layer, with the shortcut around it.

    Attributes:
        x: (rows, channels, height, width); (rows, channels) after the last convolution.
        shortcut: the input of the present block, (rows, channels, height, width); None outside of one.
    """

    x: Tensor
    shortcut: Tensor | None = None


Layer = Callable[[Activations], Activations]


@dataclass(frozen=True)
class Named:
    """A layer with weights.

    Attributes:
        name: the module's name in the network.
        module: the module.
    """

    name: str
    module: nn.Module

    def __call__(self, at: Activations) -> Activations:
        return Activations(self.module(at.x), at.shortcut)


def relu(at: Activations) -> Activations:
    return Activations(at.x.relu(), at.shortcut)


def enter_block(at: Activations) -> Activations:
    return Activations(at.x, at.x)


def leave_block(at: Activations) -> Activations:
    """Add the shortcut: every second pixel, and zeros for new channels, where the block has halved the picture."""
    assert at.shortcut is not None
    shortcut, channels = at.shortcut, at.x.shape[1]
    if channels != shortcut.shape[1]:
        shortcut = F.pad(shortcut[:, :, ::2, ::2], (0, 0, 0, 0, 0, channels - shortcut.shape[1]))
    return Activations((at.x + shortcut).relu())


def mean_over_pixels(at: Activations) -> Activations:
    return Activations(at.x.mean((2, 3)))


class Block(nn.Module):
    """The weights of a block; the network runs them."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = 1 if channels == channels_in else 2
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(GROUPS, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(GROUPS, channels)


class ResNet20(nn.Module):
    """Takes pictures, (rows, channels, height, width), and returns logits, (rows, classes)."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, 16)
        widths = [16, *(width for width in (16, 32, 64) for _ in range(3))]
        self.blocks = nn.ModuleList(Block(*pair) for pair in pairwise(widths))
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def layers(self) -> Iterator[Layer]:
        """Yield the layers in the order in which they run, which is that of their weights."""
        yield from (Named("conv", self.conv), Named("norm", self.norm), relu)
        for index, block in enumerate(self.blocks):
            yield enter_block
            names = ("conv_1", "norm_1", "conv_2", "norm_2")
            first, norm, second, last = (Named(f"blocks.{index}.{name}", getattr(block, name)) for name in names)
            yield from (first, norm, relu, second, last, leave_block)
        yield from (mean_over_pixels, Named("linear", self.linear))

    def forward(self, pictures: Tensor) -> Tensor:
        at = Activations(pictures)
        for layer in self.layers():
            at = layer(at)
        return at.x
