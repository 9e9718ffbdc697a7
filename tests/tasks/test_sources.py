import urllib.error

import pytest
from datasets import Dataset
from huggingface_hub import constants

from zo_hf.tasks import sources
from zo_hf.tasks.data import LabeledSentences
from zo_hf.tasks.job_arguments import HUB_DATASET, HUB_MODEL, JobArguments
from zo_hf.tasks.sources import Sources, choose_sources, load_sentences


@pytest.fixture(params=[True, False], ids=["hub", "no hub"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(sources, "hub_answers", lambda: request.param)
    return request.param


def test_the_recipe_is_used_where_the_hub_answers(hub: bool) -> None:
    chosen = choose_sources(JobArguments())
    if hub:
        assert chosen == Sources(HUB_MODEL, HUB_DATASET, notice=None)
    else:
        assert (chosen.model, chosen.dataset) == (None, None)
        assert chosen.notice is not None
        assert chosen.notice.startswith("No answer from the hub")


def test_offline_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_answers", lambda: pytest.fail("asked the hub"))
    chosen = choose_sources(JobArguments(offline=True))
    assert chosen.notice == "--offline: using the embedded SmolLM2-135M-Instruct and Rotten Tomatoes sentences."


def test_what_is_named_is_kept(hub: bool) -> None:
    chosen = choose_sources(JobArguments(model_name_or_path="mine", train_file="films.csv"))
    assert chosen == Sources("mine", None, notice=None)
    assert choose_sources(JobArguments(model_name_or_path="mine")).model == "mine"


def test_a_hub_that_cannot_be_reached_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: object, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert not sources.hub_answers()


def test_hugging_faces_own_offline_switch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert not sources.hub_answers()


def test_every_label_needs_a_verbalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Dataset.from_dict({"text": ["a"], "label": [2]})
    monkeypatch.setattr(sources, "embedded_reviews", lambda *sizes: LabeledSentences("test", table, table))
    with pytest.raises(ValueError, match="the label 2, but --verbalizers has 2 words"):
        load_sentences(JobArguments(), Sources(None, None, None), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_eval_examples": 0}, "--num_eval_examples=0 must be a whole number of at least 1"),
        ({"train_file": "a.csv", "dataset_name": "b"}, "give one of them"),
        ({"validation_file": "a.csv"}, "needs --train_file; give both"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobArguments(**options)
