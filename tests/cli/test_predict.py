import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from zo_hf.cli import main as cli
from zo_hf.tasks.classify import label_scores
from zo_hf.tasks.predicting import predict
from zo_hf.tasks.prompts import PROMPT_A
from zo_hf.tasks.saved_prompt import load_prompt, save_prompt

SENTENCES = ["a deep and moving film .", "dull ."]


@pytest.fixture
def folder(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_prompt(tmp_path, PROMPT_A, torch.tensor([0.9, 0.1]).log())
    return tmp_path


def test_a_saved_prompt_comes_back(tmp_path: Path) -> None:
    prior = torch.tensor([0.25, 0.75]).log()
    save_prompt(tmp_path, PROMPT_A, prior)
    prompt, loaded = load_prompt(tmp_path)
    assert prompt == PROMPT_A
    torch.testing.assert_close(loaded, prior)


def test_predictions_are_the_models_scores(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = label_scores(model, tokenizer, SENTENCES, PROMPT_A).softmax(dim=-1)
    for (word, probability), row in zip(predict(folder, SENTENCES), expected, strict=True):
        assert word == ("terrible", "great")[row.argmax()]
        assert math.isclose(probability, row.max(), rel_tol=1e-5)


def test_calibration_subtracts_the_saved_prior(folder: Path) -> None:
    # The tiny random models hardly prefer a word; the saved prior prefers label 0 by far, so label 1 is left.
    assert [word for word, _ in predict(folder, SENTENCES, calibrate=True)] == ["great", "great"]


def test_the_command_prints_a_line_for_each_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["predict", str(folder), *SENTENCES])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines] == SENTENCES
