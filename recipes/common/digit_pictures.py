"""scikit-learn's pictures of digits in batches, and the loss of a batch at several probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


class Digits:
    """1,437 training pictures of 8 x 8 pixels and 360 held-out ones, the same for all runs.

    Args:
        shape: of a picture, 64 numbers.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        pictures = torch.tensor(data.data, dtype=torch.float32)[order].view(-1, *shape) / 16
        labels = torch.tensor(data.target)[order]
        self.train = pictures[:1437], labels[:1437]
        self.held_out = pictures[1437:], labels[1437:]

    def batches(self, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end, with a new order in every epoch."""
        generator = torch.Generator().manual_seed(seed)
        pictures, labels = self.train
        while True:
            for rows in torch.randperm(len(labels), generator=generator).split(size):
                if len(rows) == size:
                    yield pictures[rows], labels[rows]


class BatchLoss:
    """The loss of one batch, for one probe or for several in one forward pass.

    Args:
        model: the classifier.
        pictures: (rows, ...).
        labels: (rows,).
    """

    def __init__(self, model: nn.Module, pictures: Tensor, labels: Tensor) -> None:
        self.model, self.pictures, self.labels, self.rows = model, pictures, labels, len(labels)

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.model(self.pictures), self.labels)

    def batched(self, copies: int) -> Tensor:
        """Return the losses of `copies` probes, (copies,), from one forward pass."""
        logits = self.model(torch.cat([self.pictures] * copies))
        return F.cross_entropy(logits, self.labels.repeat(copies), reduction="none").view(copies, -1).mean(1)


@torch.no_grad()
def measure(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """Return the loss on the training pictures, and the accuracy on the held-out ones."""
    pictures, labels = digits.held_out
    loss = float(F.cross_entropy(model(digits.train[0]), digits.train[1]))
    return loss, float((model(pictures).argmax(1) == labels).float().mean())
