"""Eight rows at once and four micro-batches of two have the same loss and the same estimate, whatever the loss is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.conftest import TinyTask, seeded, tiny_bert, tiny_llama, tiny_opt
from tests.trainer.runs import InOrder, logged, make_trainer

SIZE = 8


class Labeled(Dataset):
    """Rows of `TinyTask` with labels from `label(index)`."""

    def __init__(self, label: Any) -> None:
        self.rows = [TinyTask()[i] | {"labels": label(i)} for i in range(SIZE)]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def ragged(index: int) -> Tensor:
    """Labels of tokens, at another number of positions in every row."""
    return torch.where(torch.arange(12) <= index, index % 2, -100)


class OwnMean(InOrder):
    """Returns a mean over the rows, and does not look at `num_items_in_batch`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).logits[:, -1].square().mean()


class OnTopOfStock(InOrder):
    """Adds to what Trainer computes."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def mean_of_outputs(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs["logits"][:, -1].square().mean()


def sum_over_count(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def opt_classifier(**options: Any) -> nn.Module:
    return OPTForSequenceClassification(tiny_opt(num_labels=3, **options).config)


def bert(kind: type, **options: Any) -> nn.Module:
    config = tiny_bert().config
    config.update({"num_labels": 3, **options})
    return kind(config)


def tiny_roberta() -> nn.Module:
    """A masked language model whose forward ignores `num_items_in_batch`."""
    sizes = {name: getattr(tiny_bert().config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_dropout_prob": 0.0}
    return RobertaForMaskedLM(RobertaConfig(**sizes, **layers, attention_probs_dropout_prob=0.0))


classes = Labeled(lambda i: torch.tensor(i % 3))
numbers = Labeled(lambda i: torch.tensor(i / 3))
several = Labeled(lambda i: torch.tensor([i % 2, 1, 0]).float())
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "causal": (tiny_llama, TinyTask(SIZE), {}),
    "causal, label smoothing": (tiny_llama, TinyTask(SIZE), {"label_smoothing_factor": 0.2}),
    "classes": (opt_classifier, classes, {}),
    "classes of an encoder": (partial(bert, BertForSequenceClassification), classes, {}),
    "regression": (partial(opt_classifier, problem_type="regression"), several, {}),
    "one number": (partial(bert, BertForSequenceClassification, num_labels=1), numbers, {}),
    "several labels": (partial(bert, BertForSequenceClassification), several, {}),
    "tokens": (partial(bert, BertForTokenClassification), Labeled(ragged), {}),
    "masked tokens": (tiny_roberta, Labeled(ragged), {}),
    "compute_loss": (tiny_llama, TinyTask(SIZE), {"kind": OwnMean}),
    "compute_loss on top": (opt_classifier, classes, {"kind": OnTopOfStock}),
    "compute_loss on top of causal": (tiny_llama, TinyTask(SIZE), {"kind": OnTopOfStock}),
    "compute_loss_func": (tiny_llama, TinyTask(SIZE), {"more": {"compute_loss_func": mean_of_outputs}}),
    "compute_loss_func with the count": (tiny_llama, TinyTask(SIZE), {"more": {"compute_loss_func": sum_over_count}}),
}


@pytest.mark.parametrize(
    ("name", "batched"),
    [(name, False) for name in CASES] + [(name, "auto") for name in ("causal", "classes", "tokens", "masked tokens")],
)
def test_micro_batches_are_parts_of_one_batch(tmp_path: Path, name: str, batched: str | bool) -> None:
    build, data, options = CASES[name]
    found = []
    for rows, micro_batches in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path / f"{rows}",
            seeded(build),
            options.get("kind", InOrder),
            {"train_dataset": data} | options.get("more", {}),
            max_steps=1,
            zo_batched_probes=batched,
            zo_eps=1e-2,
            learning_rate=1e-4,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            **{k: v for k, v in options.items() if k not in ("kind", "more")},
        )
        trainer.train()
        found.append((logged(trainer, "loss"), logged(trainer, "zo/projected_grad")))
    (loss, c), (other_loss, other_c) = found
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert other_c == pytest.approx(c, rel=5e-3, abs=2e-3 * abs(loss[0]))
    assert abs(loss[0]) > 1e-3
