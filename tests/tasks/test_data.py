import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from zo_hf.tasks import data
from zo_hf.tasks.data import (
    embedded_reviews,
    file_sentences,
    hub_sentences,
    read_table,
    split_sentences,
    text_and_label,
)


def sentences(count: int, prefix: str = "sentence") -> Dataset:
    return Dataset.from_dict({"text": [f"{prefix} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]})


def test_one_table_is_split_without_overlap() -> None:
    split = split_sentences("test", sentences(100), None, num_train=60, num_held_out=30, seed=0)
    train, held_out = set(split.train["text"]), set(split.held_out["text"])
    assert (len(train), len(held_out)) == (60, 30)
    assert not train & held_out


def test_texts_that_differ_only_in_case_or_spaces_are_one_text() -> None:
    table = Dataset.from_dict({"text": ["Good  film", "good film", " good film ", "bad film"], "label": [1, 1, 1, 0]})
    split = split_sentences("test", table, None, num_train=10, num_held_out=10, seed=0)
    assert len(split.train) == len(split.held_out) == 1


def test_training_sentences_that_are_held_out_are_dropped() -> None:
    split = split_sentences("test", sentences(20), sentences(5), num_train=20, num_held_out=20, seed=0)
    assert len(split.held_out) == 5
    assert set(split.train["text"]) == {f"sentence {i}" for i in range(5, 20)}


def test_the_seed_alone_decides_the_split() -> None:
    first, again, other = (split_sentences("test", sentences(50), None, 20, 20, seed) for seed in (1, 1, 2))
    assert first.train["text"][:] == again.train["text"][:]
    assert first.train["text"][:] != other.train["text"][:]


def test_held_out_sentences_do_not_depend_on_the_training_size() -> None:
    few, many = (split_sentences("test", sentences(50), None, size, 10, seed=0) for size in (5, 30))
    assert few.held_out["text"][:] == many.held_out["text"][:]


def test_a_small_table_keeps_half_for_training() -> None:
    split = split_sentences("test", sentences(10), None, num_train=1000, num_held_out=400, seed=0)
    assert (len(split.train), len(split.held_out)) == (5, 5)


def test_too_little_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="give more data"):
        split_sentences("test", sentences(1), None, num_train=10, num_held_out=10, seed=0)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_local_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"films{suffix}"
    rows = [{"review": f"film number {i}", "stars": i % 3} for i in range(12)]
    if suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        lines = [separator.join(rows[0])] + [separator.join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    split = file_sentences(str(path), None, 6, 6, seed=0, text_column="review", label_column="stars")
    assert {*split.train["text"], *split.held_out["text"]} == {row["review"] for row in rows}
    assert set(split.train["label"]) <= {0, 1, 2}


def test_sentence_is_preferred_to_text() -> None:
    table = Dataset.from_dict({"text": ["no"], "sentence": ["yes"], "label": [0]})
    assert text_and_label(table)["text"][:] == ["yes"]


@pytest.mark.parametrize(
    ("option", "columns"), [("--text_column", {"label": [0]}), ("--label_column", {"text": ["a"]})]
)
def test_a_missing_column_is_named_with_its_option(option: str, columns: dict[str, list[object]]) -> None:
    with pytest.raises(ValueError, match=option):
        text_and_label(Dataset.from_dict(columns))


@pytest.mark.parametrize("label", ["good", -1, 0.5, None])
def test_labels_that_are_not_counted_from_zero_are_refused(label: object) -> None:
    with pytest.raises(ValueError, match="must hold the integers"):
        text_and_label(Dataset.from_dict({"text": ["a"], "label": [label]}))


def test_files_that_are_not_there_or_not_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_table(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="use a file ending in"):
        read_table("films.parquet")


def test_hub_data_uses_its_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = DatasetDict(train=sentences(9, "train"), validation=sentences(4, "validation"), test=sentences(4, "test"))
    monkeypatch.setattr(data, "load_dataset", lambda name, config: splits)
    split = hub_sentences("stanfordnlp/sst2", None, num_train=5, num_held_out=10, seed=0)
    assert len(split.train) == 5
    assert set(split.held_out["text"]) == {f"validation {i}" for i in range(4)}


def test_embedded_reviews_are_short_rotten_tomatoes_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["text,label,source", "too short,1,rotten_tomatoes"]
    for i in range(10):
        lines += [f"a b c d e f g h film {i},1,rotten_tomatoes", f"a b c d e f g h review {i},0,imdb"]
    (tmp_path / "reviews.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(data, "movie_reviews", lambda: tmp_path / "reviews.csv")
    split = embedded_reviews(num_train=100, num_held_out=4, seed=0)
    assert len(split.train) == 6
    assert all("film" in text for text in [*split.train["text"], *split.held_out["text"]])
