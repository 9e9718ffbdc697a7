"""Real text without a hub: who wrote a review, and whether it praises, from the embedded movie reviews.

Sentences of critics are from Rotten Tomatoes. Viewers are from IMDB, and a viewer's text is the end of a review, because
opinions stand there more often than at the beginning. Both are written in the style of the critics' sentences: lower
case, with spaces around punctuation. So neither letters nor spaces betray who wrote them.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from datasets import Dataset

from zo_hf.comparison.suite.task import DATA_SEED, Parts, Sizes, parts_of
from zo_hf.tasks.assets import loaded_asset, movie_reviews
from zo_hf.tasks.data import embedded_reviews

#: Lengths below this say too little.
MIN_WORDS = 8


def sentiment(sizes: Sizes) -> Parts:
    """Return sentences of critics, 0 negative and 1 positive, the same as in `zo-hf train --offline`."""
    found = embedded_reviews(sizes.train, 2 * sizes.held_out, DATA_SEED, _lengths(sizes))
    half = len(found.held_out) // 2
    train, held_out = (_without_pair(part) for part in (found.train, found.held_out))
    return Parts(train, held_out.select(range(half)), held_out.select(range(half, 2 * half)))


def viewers(sizes: Sizes) -> Parts:
    """Return ends of viewers' reviews, 0 negative and 1 positive."""
    longest = max(_lengths(sizes))
    rows = [
        {"text": ending(row["text"], longest), "label": int(row["label"])}
        for row in _rows()
        if row["source"] == "imdb"
    ]
    return parts_of(_shuffled(rows), sizes, "viewers")


def source(sizes: Sizes) -> Parts:
    """Return as many texts of critics (0) as of viewers (1), of lengths in the same range."""
    lengths = _lengths(sizes)
    by_source: dict[str, list[str]] = {"rotten_tomatoes": [], "imdb": []}
    for row in _rows():
        by_source[row["source"]].append(row["text"])
    critics = [text for text in map(in_style, by_source["rotten_tomatoes"]) if len(text.split()) in lengths]
    # Each end of a viewer's review gets the length of a critic's sentence, which then tells nothing.
    ends = zip(critics, by_source["imdb"], strict=False)
    viewers = [ending(text, len(critic.split())) for critic, text in ends]
    rows = [{"text": text, "label": 0} for text in critics[: len(viewers)]]
    rows += [{"text": text, "label": 1} for text in viewers]
    return parts_of(_shuffled(rows), sizes, "source")


def ending(text: str, words: int) -> str:
    """Return the last words of a review, in the critics' style."""
    # No word is that long, so the rest of the review need not be looked at.
    return " ".join(in_style(text[-50 * words :]).split()[-words:])


def in_style(text: str) -> str:
    """Return a text in lower case, with spaces around punctuation and without line breaks of HTML."""
    return " ".join(re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[^\sa-z0-9]", text.lower().replace("<br />", " ")))


def _lengths(sizes: Sizes) -> range:
    return range(min(MIN_WORDS, sizes.max_words), sizes.max_words + 1)


def _rows() -> list[dict[str, str]]:
    def read(path: Path) -> list[dict[str, str]]:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, strict=True))

    return loaded_asset(movie_reviews, read)


def _shuffled(rows: list[dict[str, object]]) -> Dataset:
    distinct = {str(row["text"]): row | {"pair": ""} for row in rows}
    return Dataset.from_list(list(distinct.values())).shuffle(seed=DATA_SEED)


def _without_pair(rows: Dataset) -> Dataset:
    return rows.add_column("pair", [""] * len(rows))
