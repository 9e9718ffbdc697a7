import copy

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from zo_hf.tasks.classify import accuracy, calibrated, label_prior, label_scores, majority_accuracy
from zo_hf.tasks.prompts import PROMPT_A, label_token_ids

SENTENCES = ["a deep and moving film .", "dull .", "an hour too long and dull . it works", "", "great"]


def reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: list[str]) -> torch.Tensor:
    """One sentence at a time, without padding, every position computed."""
    model.eval()
    labels = label_token_ids(tokenizer, PROMPT_A)
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer(PROMPT_A.fill(text))["input_ids"]])).logits[0, -1] for text in sentences]
    return torch.stack(rows).log_softmax(-1)[:, labels]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_equal_one_sentence_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    scores = label_scores(model, tokenizer, SENTENCES, PROMPT_A, batch_size)
    torch.testing.assert_close(scores, reference(model, tokenizer, SENTENCES))


def test_scores_equal_the_reference_where_all_logits_come_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, attention_mask, position_ids: full(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        ),
    )
    scores = label_scores(model, tokenizer, SENTENCES, PROMPT_A)
    monkeypatch.undo()
    torch.testing.assert_close(scores, reference(model, tokenizer, SENTENCES))


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    model.train(training)
    label_scores(model, tokenizer, SENTENCES, PROMPT_A)
    assert model.training is training


def test_the_models_mode_is_restored_after_an_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()

    def fails(**inputs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        label_scores(model, tokenizer, SENTENCES, PROMPT_A)
    assert model.training


def test_a_tokenizer_without_padding_token_works(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    without_padding = copy.deepcopy(tokenizer)
    without_padding.pad_token = None
    scores = label_scores(model, without_padding, SENTENCES, PROMPT_A)
    torch.testing.assert_close(scores, label_scores(model, tokenizer, SENTENCES, PROMPT_A))


def test_the_prior_is_a_distribution_and_calibration_removes_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prior = label_prior(model, tokenizer, PROMPT_A)
    torch.testing.assert_close(prior.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(calibrated(prior[None], prior), torch.zeros(1, 2))


def test_calibration_undoes_a_constant_bias() -> None:
    scores = torch.tensor([[-1.0, -1.1], [-1.0, -0.9]])
    bias = torch.tensor([-5.0, 0.0])
    assert accuracy(scores + bias, [0, 1]) == 0.5
    assert accuracy(calibrated(scores + bias, bias), [0, 1]) == 1.0


def test_majority_accuracy() -> None:
    assert majority_accuracy([0, 1, 1, 2, 1]) == 0.6
