"""Inside of the context, the output layer computes the logits of the label words, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_gpt2, tiny_llama, tiny_opt, weights_of
from zo_hf.subspaces import LowRank
from zo_hf.tasks.label_word_head import label_words_alone
from zo_hf.tasks.label_word_loss import LabelWordLoss

LABEL_IDS = [7, 3]


def inputs_of(rows: int = 4) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in causal_batch(rows).items() if name != "labels"}


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2])
def test_the_logits_are_those_of_the_words_and_the_loss_is_the_same(build: type) -> None:
    model = seeded(build).eval()
    inputs, before = inputs_of(), weights_of(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = torch.tensor(LABEL_IDS)[torch.arange(len(labels)) % 2]
    loss = LabelWordLoss(LABEL_IDS)
    with torch.no_grad():
        whole = model(**inputs)
        with label_words_alone(model, LABEL_IDS, ()):
            narrow = model(**inputs)
        again = model(**inputs)
    assert narrow.logits.shape == (*whole.logits.shape[:-1], 2)
    torch.testing.assert_close(narrow.logits, whole.logits[..., LABEL_IDS])
    torch.testing.assert_close(loss(narrow, labels), loss(whole, labels))
    assert torch.equal(again.logits, whole.logits)
    assert_same_bits(weights_of(model), before)


def test_an_exception_leaves_the_output_layer_as_it_was() -> None:
    model = seeded(tiny_llama).eval()
    with pytest.raises(RuntimeError, match="in the middle"), label_words_alone(model, LABEL_IDS, ()):
        raise RuntimeError("in the middle")
    assert model(**inputs_of()).logits.shape[-1] == model.config.vocab_size


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_that_moves_stays_whole(tied: bool) -> None:
    model = seeded(tiny_llama, tie_word_embeddings=tied).eval()
    space = LowRank(model)
    moving = frozenset(module for site in space.sites for module, _ in site.uses)
    with label_words_alone(model, LABEL_IDS, moving):
        assert model(**inputs_of()).logits.shape[-1] == model.config.vocab_size


def test_a_module_without_an_output_layer_stays_as_it_is() -> None:
    model = nn.Linear(3, 3)
    with label_words_alone(model, LABEL_IDS, ()):
        assert "forward" not in model.__dict__
