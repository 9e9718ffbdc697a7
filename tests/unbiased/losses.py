"""The losses that the suite covers: a new one is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
    default_data_collator,
)
from transformers.trainer_pt_utils import LabelSmoother

from tests.conftest import tiny_bert, tiny_llama, tiny_t5
from tests.trainer.runs import InOrder
from zo_hf import RowLosses

ROWS, LENGTH, VOCABULARY, WIDTH, CLASSES = 4, 6, 8, 4, 3
SMOOTHING = 0.2
Call = Callable[..., Any]


def llama(kind: type | None = None, **options: Any) -> nn.Module:
    size = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 0.5}
    model = tiny_llama(**size, **heads, **options)
    return model if kind is None else kind(model.config)


def bert(kind: type, **options: Any) -> nn.Module:
    size = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    return kind(tiny_bert(**size, num_attention_heads=1, initializer_range=0.5, **options).config)


def t5() -> nn.Module:
    return tiny_t5(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH, d_ff=WIDTH, num_layers=1, num_heads=1)


def tokens(seed: int = 0, rows: int = ROWS) -> Tensor:
    """(rows, LENGTH)"""
    return torch.randint(1, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def padded(
    labels: Tensor | None = None, in_front: bool = False, rows: int = ROWS, **others: Tensor
) -> dict[str, Tensor]:
    """Rows of unlike length.

    Args:
        labels: of a token, (rows, LENGTH), of which each row keeps another number; or of a row.
        in_front: where the padding is; models that read the first position need it behind.
        others: more tensors of the batch.
    """
    place, row = torch.arange(LENGTH), torch.arange(rows)[:, None]
    mask = place >= row % 2 if in_front else place < LENGTH - row % 2
    batch = {"input_ids": tokens(0, rows) * mask, "attention_mask": mask.long(), **others}
    if labels is not None and labels.shape == mask.shape:
        labels = torch.where(mask & (place >= LENGTH - 1 - row % 4), labels, -100)
    return batch if labels is None else batch | {"labels": labels}


def own(call: Call, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss of the whole batch."""
    return call(**batch).loss


def mean_of_rows(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A function for `compute_loss_func`: the mean over rows."""
    return F.cross_entropy(outputs["logits"][:, -2], labels[:, -1])


def sum_over_labels(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Another: the sum over labels, divided by their number in the step."""
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def of_outputs(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Call, Mapping[str, Any]], Tensor]:
    """The loss that a function of outputs and labels gives."""

    def whole(call: Call, batch: Mapping[str, Any]) -> Tensor:
        return function(call(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    return whole


class MarksRows(InOrder):
    """Returns one loss for every row."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return RowLosses(marked(model, inputs))


def marked(call: Call, batch: Mapping[str, Any]) -> Tensor:
    """(rows,)"""
    logits = call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, -2], batch["labels"][:, -1], reduction="none")


@dataclass(frozen=True)
class Loss:
    """A model, a batch, and the loss of it.

    Args:
        build: makes the model, of `WIDTH` and one layer.
        batch: tensors of `ROWS` rows; or the sequences to pack, as `collator` takes them.
        whole: the loss of a whole step, from the model and the step's rows in one batch.
        groups: groups that have directions of their own with one row for each, if the loss comes apart.
        micro_batches: how many a step is divided into.
        kind: the trainer.
        trainer: its arguments beside the model, the data and the config.
        options: its config's.
        task: PEFT's name of the task; None for one that it does not know.
        collator: makes a batch of rows.
        without: names of the subspaces in which this is another loss.
    """

    build: Callable[[], nn.Module]
    batch: Any
    whole: Callable[[Call, Mapping[str, Any]], Tensor] = own
    groups: int = ROWS
    micro_batches: int = 1
    kind: type[InOrder] = InOrder
    trainer: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = "CAUSAL_LM"
    collator: Callable[[list[Any]], Any] = default_data_collator
    without: Sequence[str] = ()

    @property
    def rows(self) -> list[Any]:
        """The dataset."""
        if isinstance(self.batch, list):
            return self.batch
        return [{name: tensor[row] for name, tensor in self.batch.items()} for row in range(ROWS)]


RAGGED = padded(tokens(), in_front=True)
OTHER_TOKENS = padded(tokens(1))
CLASSES_OF_TOKENS = padded(tokens() % CLASSES)
CLASSES_OF_ROWS = torch.arange(ROWS) % CLASSES
SPANS = {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 4, 3, 5])}
PACKED = [{"input_ids": row[: 3 + i].tolist(), "labels": row[: 3 + i].tolist()} for i, row in enumerate(tokens())]
SMOOTHED = of_outputs(lambda outputs, labels: LabelSmoother(SMOOTHING)(outputs, labels, shift_labels=True))


def flat(rows: list[Any]) -> dict[str, Any]:
    """A cache would make transformers' masks overlook where sequences begin."""
    return {**DataCollatorWithFlattening()(rows), "use_cache": False}


LOSSES = {
    "causal": Loss(llama, RAGGED),
    "causal, tied": Loss(lambda: llama(tie_word_embeddings=True), RAGGED),
    "causal, accumulated": Loss(llama, RAGGED, micro_batches=2),
    "masked": Loss(lambda: bert(BertForMaskedLM), OTHER_TOKENS, task=None),
    "masked, accumulated": Loss(lambda: bert(BertForMaskedLM), OTHER_TOKENS, micro_batches=2, task=None),
    "classes": Loss(
        lambda: bert(BertForSequenceClassification, num_labels=CLASSES),
        padded(labels=CLASSES_OF_ROWS),
        task="SEQ_CLS",
    ),
    "classes, causal": Loss(
        lambda: llama(LlamaForSequenceClassification, num_labels=CLASSES),
        padded(labels=CLASSES_OF_ROWS),
        task="SEQ_CLS",
    ),
    "several labels": Loss(
        lambda: bert(BertForSequenceClassification, num_labels=CLASSES, problem_type="multi_label_classification"),
        padded(labels=(torch.arange(ROWS * CLASSES).view(ROWS, CLASSES) % 2).float()),
        task="SEQ_CLS",
    ),
    "regression": Loss(
        lambda: bert(BertForSequenceClassification, num_labels=1),
        padded(labels=torch.linspace(-1, 2, ROWS)),
        task="SEQ_CLS",
    ),
    "tokens": Loss(
        lambda: bert(BertForTokenClassification, num_labels=CLASSES),
        CLASSES_OF_TOKENS,
        task="TOKEN_CLS",
    ),
    "tokens, accumulated": Loss(
        lambda: bert(BertForTokenClassification, num_labels=CLASSES),
        CLASSES_OF_TOKENS,
        micro_batches=2,
        task="TOKEN_CLS",
    ),
    "answers": Loss(lambda: bert(BertForQuestionAnswering), padded(**SPANS), groups=1, task="QUESTION_ANS"),
    "translation": Loss(t5, OTHER_TOKENS, task="SEQ_2_SEQ_LM"),
    "translation, accumulated": Loss(t5, OTHER_TOKENS, micro_batches=2, task="SEQ_2_SEQ_LM"),
    "function, mean": Loss(llama, RAGGED, of_outputs(mean_of_rows), trainer={"compute_loss_func": mean_of_rows}),
    "function, sum": Loss(
        llama,
        RAGGED,
        of_outputs(sum_over_labels),
        micro_batches=2,
        trainer={"compute_loss_func": sum_over_labels},
    ),
    "smoothed": Loss(
        llama,
        {**RAGGED, "labels": torch.where(torch.arange(LENGTH) > 3, tokens(), -100)},
        SMOOTHED,
        options={"label_smoothing_factor": SMOOTHING},
        without=("prefix",),  # Trainer does not shift the labels behind one
    ),
    "packed": Loss(llama, PACKED, collator=flat, without=("prefix",)),  # which does not keep sequences apart
    "packed, accumulated": Loss(llama, PACKED, collator=flat, micro_batches=2, without=("prefix",)),
    "marked rows": Loss(llama, RAGGED, lambda call, batch: marked(call, batch).mean(), kind=MarksRows),
    "marked rows, accumulated": Loss(
        llama, RAGGED, lambda call, batch: marked(call, batch).mean(), micro_batches=2, kind=MarksRows
    ),
}
