"""The loss among the label words is the cross entropy of a classifier whose classes are those words."""

import math

import torch
from transformers.modeling_outputs import CausalLMOutput

from zo_hf.tasks.label_word_loss import LabelWordLoss

LABEL_IDS = [7, 3]


def batch(rows: int = 5) -> tuple[CausalLMOutput, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(0)
    answers = [row % 2 for row in range(rows)]
    labels = torch.full((rows, 4), -100)
    labels[:, -1] = torch.tensor([LABEL_IDS[answer] for answer in answers])
    return CausalLMOutput(logits=torch.randn(rows, 4, 11, generator=generator)), labels, answers


def test_equals_a_computation_by_hand() -> None:
    outputs, labels, answers = batch()
    losses = []
    for row, answer in enumerate(answers):
        scores = [outputs.logits[row, 2, token].item() for token in LABEL_IDS]
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[answer])
    loss = LabelWordLoss(LABEL_IDS)(outputs, labels)
    assert math.isclose(loss.item(), sum(losses) / len(losses), rel_tol=1e-5)


def test_other_words_and_positions_do_not_matter() -> None:
    outputs, labels, _ = batch()
    loss = LabelWordLoss(LABEL_IDS)(outputs, labels)
    changed = outputs.logits.clone()
    changed[:, [0, 1, 3]] += 5.0
    others = [token for token in range(11) if token not in LABEL_IDS]
    changed[:, 2, others] += 5.0
    assert torch.equal(LabelWordLoss(LABEL_IDS)(CausalLMOutput(logits=changed), labels), loss)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    outputs, labels, answers = batch()
    whole = LabelWordLoss(LABEL_IDS)(outputs, labels)
    parts = [
        LabelWordLoss(LABEL_IDS)(CausalLMOutput(logits=outputs.logits[rows]), labels[rows], len(answers))
        for rows in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole)
