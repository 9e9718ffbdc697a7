"""Training from scratch: two small networks on scikit-learn's 1,797 pictures of handwritten digits, 8 x 8 pixels.

Both networks take `pixel_values`, float32 of shape (rows, 1, 8, 8) between 0 and 1, and `labels`, int64 (rows,), and return
a dictionary with `loss` and `logits`, (rows, 10).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from zo_hf.comparison.suite.task import DATA_SEED, Parts, Sizes

CLASSES = 10


def digits(sizes: Sizes) -> Parts:
    """Return pictures of digits, data sets with the columns `pixel_values` (64 numbers) and `label`.

    Raises:
        ValueError: scikit-learn is missing, or has fewer pictures.
    """
    if find_spec("sklearn") is None:
        raise ValueError(
            "the tasks digits-cnn and digits-transformer need scikit-learn; install it, or choose other --tasks."
        )
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    if sizes.train + 2 * sizes.held_out > len(order):
        raise ValueError(
            f"--train-rows {sizes.train} and twice --eval-rows {sizes.held_out} are more than the {len(order)} pictures of "
            "digits; lower them, or choose other --tasks."
        )

    def part(start: int, number: int) -> Dataset:
        rows = [
            {"pixel_values": (data.data[i] / 16).tolist(), "label": int(data.target[i])}
            for i in order[start:][:number]
        ]
        return Dataset.from_list(rows)

    held_out = sizes.held_out
    return Parts(part(2 * held_out, sizes.train), part(0, held_out), part(held_out, held_out))


def batch_of_pictures(rows: list[dict[str, object]]) -> dict[str, Tensor]:
    """Return the arguments of the networks for some rows of `digits`."""
    pixels = torch.tensor([row["pixel_values"] for row in rows], dtype=torch.float32).view(-1, 1, 8, 8)
    return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


class ConvolutionalNetwork(nn.Module):
    """Two convolutions of 3 x 3 with pooling, and a linear layer: 1,898 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return `logits`, and `loss` if there are labels."""
        logits = self.layers(pixel_values)
        found = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return found | {"logits": logits}


def transformer() -> ViTForImageClassification:
    """Return a transformer of two layers of width 32 over the 16 patches of 2 x 2 pixels."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return ViTForImageClassification(config)


#: Networks by the name of their task.
NETWORKS: dict[str, Callable[[], nn.Module]] = {"digits-cnn": ConvolutionalNetwork, "digits-transformer": transformer}
