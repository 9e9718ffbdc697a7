import logging

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from zo_hf.tasks.batching import left_pad
from zo_hf.tasks.prompts import (
    PROMPT_A,
    PROMPT_B,
    LabelWordCollator,
    Prompt,
    encode_example,
    encode_prompt,
    label_token_ids,
)

TEXTS = ["a deep and moving film .", "dull .", "an hour too long and dull . it works"]


def test_label_tokens_are_the_words_after_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in (PROMPT_A, PROMPT_B):
        assert [tokenizer.decode([token]) for token in label_token_ids(tokenizer, prompt)] == list(prompt.verbalizers)


def test_a_word_of_several_tokens_is_scored_by_its_first_and_says_so(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = label_token_ids(tokenizer, Prompt("{text} It was", (" terrible film", " great")))
    assert tokenizer.decode([first]) == " terrible"
    assert tokenizer.decode([second]) == " great"
    assert "' terrible film' has several tokens" in caplog.text


def test_words_that_share_their_first_token_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="must differ in their first token"):
        label_token_ids(tokenizer, Prompt("{text} It was", (" great film", " great hour")))


def test_a_word_that_merges_into_the_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="start each of --verbalizers with a space"):
        label_token_ids(tokenizer, Prompt("{text} It gre", ("at", "en")))


@pytest.mark.parametrize("template", ["no text", "{text} and {text}"])
def test_the_template_has_the_text_once(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        Prompt(template, (" a", " b"))


@pytest.mark.parametrize("verbalizers", [(" one",), (" same", " same")])
def test_verbalizers_are_two_or_more_different_words(verbalizers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="different words"):
        Prompt("{text}", verbalizers)


def test_a_long_text_is_cut_and_the_template_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a deep and moving film " * 20
    ids = encode_prompt(tokenizer, PROMPT_A, text, max_length=12)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == 12
    assert decoded.startswith("a deep and moving film")
    assert decoded.endswith(" It was")


def test_a_text_with_no_room_is_left_out_entirely(tokenizer: PreTrainedTokenizerFast) -> None:
    template_alone = tokenizer(PROMPT_A.fill(""))["input_ids"]
    assert encode_prompt(tokenizer, PROMPT_A, "film " * 9, max_length=len(template_alone)) == template_alone


def test_a_max_length_below_the_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="--max_length 2 is shorter than"):
        encode_prompt(tokenizer, PROMPT_A, "film", max_length=2)


def test_only_the_label_token_has_a_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    label = label_token_ids(tokenizer, PROMPT_A)[1]
    example = encode_example(tokenizer, PROMPT_A, "dull .", label, max_length=64)
    assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == "dull . It was great"
    assert example["labels"] == [-100] * (len(example["input_ids"]) - 1) + [label]
    assert len(encode_example(tokenizer, PROMPT_A, "film " * 99, label, max_length=16)["input_ids"]) == 16


def test_left_padding_counts_positions_from_the_first_token() -> None:
    batch = left_pad([[5, 6, 7], [8]], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_the_batch_loss_is_the_mean_cross_entropy_of_the_label_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.eval()
    labels = label_token_ids(tokenizer, PROMPT_A)
    examples = [encode_example(tokenizer, PROMPT_A, text, labels[i % 2], 64) for i, text in enumerate(TEXTS)]
    alone = []
    with torch.no_grad():
        for example in examples:
            logits = model(torch.tensor([example["input_ids"][:-1]])).logits[0, -1]
            alone.append(-logits.log_softmax(-1)[example["labels"][-1]])
        batch_loss = model(**LabelWordCollator(tokenizer, model)(examples)).loss
    torch.testing.assert_close(batch_loss, torch.stack(alone).mean())


def test_the_collator_keeps_all_positions_where_the_model_cannot_choose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    collator = LabelWordCollator(tokenizer, torch.nn.Linear(1, 1))
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    batch = collator(examples)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, 9]]
