"""Labeled sentences from the embedded reviews, a model hub or local files, as columns `text` and `label`."""

import csv
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, load_dataset

from zo_hf.tasks.assets import loaded_asset, movie_reviews
from zo_hf.tasks.loading import loaded

TEXT_COLUMNS = ("sentence", "text")
FILE_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class LabeledSentences:
    """Training and held-out sentences that share no text.

    Attributes:
        name: the source of the sentences, in words.
        train: a data set with the columns `text` (str) and `label` (int, from 0).
        held_out: a data set with the same columns.
    """

    name: str
    train: Dataset
    held_out: Dataset


def embedded_reviews(num_train: int, num_held_out: int, seed: int, words: range = range(8, 21)) -> LabeledSentences:
    """Return embedded Rotten Tomatoes sentences, split into training and held-out sentences (0 negative, 1 positive).

    SST-2 was drawn from the same reviews, so a model trained on these sentences must not be tested on SST-2.

    Args:
        num_train: maximum number of training sentences.
        num_held_out: maximum number of held-out sentences.
        seed: determines the selection.
        words: the allowed numbers of words in a sentence.
    """
    name = "embedded Rotten Tomatoes sentences"

    def read(path: Path) -> list[dict[str, Any]]:
        with path.open(encoding="utf-8", newline="") as file:
            reviews = [row for row in csv.DictReader(file, strict=True) if row["source"] == "rotten_tomatoes"]
        if not reviews:
            raise ValueError(f"{path} has no reviews of Rotten Tomatoes.")
        return [
            {"text": row["text"], "label": int(row["label"])} for row in reviews if len(row["text"].split()) in words
        ]

    sentences = Dataset.from_list(loaded_asset(movie_reviews, read))
    return split_sentences(name, sentences, None, num_train, num_held_out, seed)


def hub_sentences(
    dataset_name: str,
    config_name: str | None,
    num_train: int,
    num_held_out: int,
    seed: int,
    text_column: str | None = None,
    label_column: str = "label",
) -> LabeledSentences:
    """Load sentences of a data set on the hub, such as `stanfordnlp/sst2`.

    Held-out sentences come from its `validation` split, else from `test`, else from the training split.

    Raises:
        ValueError: the data set has no train split, or a column is missing or not usable.
    """
    splits = load_dataset(dataset_name, config_name)
    if "train" not in splits:
        raise ValueError(
            f"--dataset_name {dataset_name} has no train split, only {', '.join(splits)}; name a data set with one."
        )
    train = text_and_label(splits["train"], text_column, label_column)
    other = splits.get("validation", splits.get("test"))
    held_out = None if other is None else text_and_label(other, text_column, label_column)
    return split_sentences(dataset_name, train, held_out, num_train, num_held_out, seed)


def file_sentences(
    train_file: str,
    validation_file: str | None,
    num_train: int,
    num_held_out: int,
    seed: int,
    text_column: str | None = None,
    label_column: str = "label",
) -> LabeledSentences:
    """Load sentences of local CSV, TSV, JSON or JSONL files; without `validation_file`, `train_file` is split.

    Raises:
        ValueError: a file cannot be read, or a column is missing or not usable.
    """
    train = text_and_label(read_table(train_file), text_column, label_column)
    held_out = text_and_label(read_table(validation_file), text_column, label_column) if validation_file else None
    return split_sentences(train_file, train, held_out, num_train, num_held_out, seed)


def read_table(path: str) -> Dataset:
    """Read a local table; the suffix .csv, .tsv, .json or .jsonl determines the format.

    Raises:
        ValueError: the file is missing, has another suffix, cannot be read, or has no rows.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_READERS:
        raise ValueError(f"{path} cannot be read as a table; use a file ending in {', '.join(FILE_READERS)}.")
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; give the path of a table with a text and a label column.")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    remedy = "write it in UTF-8, with the same columns in every row and their names on top"
    if suffix in (".json", ".jsonl"):
        remedy = "write it in UTF-8, with one JSON object a row, all with the same keys"
    table = loaded(path, lambda: _read(FILE_READERS[suffix], path, options), remedy)
    if not len(table):
        raise ValueError(f"{path} has no rows; give a table with a text and a label column.")
    return table


def _read(reader: str, path: str, options: dict[str, str]) -> Dataset:
    # Without a cache of its own, because a file that is written anew within a second would be read from there.
    with TemporaryDirectory() as cache:
        return load_dataset(reader, data_files=path, split="train", cache_dir=cache, keep_in_memory=True, **options)


def text_and_label(table: Dataset, text_column: str | None = None, label_column: str = "label") -> Dataset:
    """Keep the text and label columns, under the names `text` and `label`.

    Without `text_column`, the text column is `sentence`, or `text` if there is no `sentence`.

    Raises:
        ValueError: a column is missing, a text is empty, or a label is not a non-negative integer.
    """
    if text_column is None:
        text_column = next((name for name in TEXT_COLUMNS if name in table.column_names), "text")
    for option, column in (("--text_column", text_column), ("--label_column", label_column)):
        if column not in table.column_names:
            raise ValueError(f"{option} {column} is not a column of the table; use one of {table.column_names}.")
    labels = table[label_column][:]
    wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, int) or label < 0]
    if wrong:
        raise ValueError(
            f"--label_column {label_column} must hold the integers 0, 1, ... in the order of --verbalizers, "
            f"not {wrong[0]!r}; number the labels, and leave out rows without a label."
        )
    texts = table[text_column][:]
    empty = [row for row, text in enumerate(texts) if text is None or not str(text).strip()]
    if empty:
        raise ValueError(
            f"--text_column {text_column} is empty in row {empty[0] + 1} of the table; leave out the {len(empty)} rows without "
            "a text."
        )
    return Dataset.from_dict({"text": [str(text) for text in texts], "label": labels})


def split_sentences(
    name: str, train: Dataset, held_out: Dataset | None, num_train: int, num_held_out: int, seed: int
) -> LabeledSentences:
    """Draw at most `num_train` and `num_held_out` sentences; no text occurs twice, and none is in both parts.

    Texts are compared without case and surplus spaces. Held-out sentences are drawn first, so they depend on `seed`
    and `num_held_out` only. If `held_out` is None they come from `train`, and are at most half of it.

    Raises:
        ValueError: a part would be empty.
    """
    train = _shuffled_unique(train, seed, seen=set())
    if held_out is None:
        size = min(num_held_out, len(train) // 2)
        held_out, train = train.select(range(size)), train.select(range(size, len(train)))
    else:
        unique = _shuffled_unique(held_out, seed, seen=set())
        held_out = unique.select(range(min(num_held_out, len(unique))))
        train = _shuffled_unique(train, seed, seen={_key(text) for text in held_out["text"]})
    train = train.select(range(min(num_train, len(train))))
    if not len(train) or not len(held_out):
        raise ValueError(
            f"{name} leaves {len(train)} training and {len(held_out)} held-out sentences; give more data."
        )
    return LabeledSentences(name, train, held_out)


def _shuffled_unique(sentences: Dataset, seed: int, seen: set[str]) -> Dataset:
    shuffled = sentences.shuffle(seed=seed)
    keep = []
    for index, text in enumerate(shuffled["text"]):
        key = _key(text)
        if key not in seen:
            seen.add(key)
            keep.append(index)
    return shuffled.select(keep)


def _key(text: str) -> str:
    return " ".join(text.lower().split())
