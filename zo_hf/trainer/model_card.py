"""The description of a training in its model card: the method, its papers, the rate, the forward passes and the seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from zo_hf.engine import ZerothOrder
from zo_hf.privacy import Guarantee
from zo_hf.version import __version__

TAGS = ("zo_hf", "zeroth-order-optimization")
_BEGIN, _END = "<!-- zo_hf: begin -->", "<!-- zo_hf: end -->"


@dataclass(frozen=True)
class Training:
    """Facts about a training, which outlive its engine.

    Args:
        settings: the method's options and their resolved values, as in a checkpoint.
        papers: the papers of the method's parts.
        steps: steps taken.
        forward_passes: forward passes spent.
        seed: the seed of all directions.
        guarantee: what private training promises; None if training was not private, or had no noise.
    """

    settings: dict[str, Any]
    papers: tuple[str, ...]
    steps: int
    forward_passes: int
    seed: int
    guarantee: Guarantee | None = None


def training_of(zo: ZerothOrder) -> Training:
    """Return the facts about an engine's training so far."""
    parts = (type(zo.estimator), type(zo.subspace), type(zo.distribution), type(zo.rule))
    abouts = [getattr(part, "about", None) for part in parts]  # a part of the user's own, and no rule, need none
    papers = dict.fromkeys(about.paper for about in abouts if about is not None and about.paper)
    guarantee = None if zo.private is None else zo.private.guarantee
    if guarantee is not None and not guarantee.noise_multiplier:
        guarantee = None
    if zo.private is not None:
        papers |= {"DP-ZO (2401.04343)": None, "DPZero (2310.09639)": None}
    return Training(zo.saved_settings(), tuple(papers), zo.step, zo.forward_passes, zo.seed, guarantee)


def describe(path: Path, training: Training, learning_rate: float | None) -> None:
    """Write the facts about a training into a model card, in place of those that it holds already.

    Args:
        path: the card, a README.md; nothing happens if it does not exist.
        training: the facts.
        learning_rate: the initial learning rate that was used; None if it is unknown.
    """
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    tags = card.data.tags or []
    card.data.tags = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *TAGS]))
    before, _, rest = card.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if rest else ""
    card.text = f"{before.rstrip()}\n\n{_section(training, learning_rate)}\n{after.lstrip()}"
    card.save(path)


def _section(training: Training, learning_rate: float | None) -> str:
    facts = {
        "steps": training.steps,
        "forward passes": training.forward_passes,
        "learning rate": "unknown" if learning_rate is None else f"{learning_rate:g}",
        "seed": training.seed,
        **{name: value for name, value in training.settings.items() if value not in (None, "", False)},
    }
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    papers = "\n".join(f"- {_linked(paper)}" for paper in training.papers)
    return f"""{_BEGIN}
## Zeroth-order training

This model was trained with forward passes only, without backpropagation, by zo_hf {__version__}.

| | |
|---|---|
{rows}

Papers:

{papers}
{_promise(training)}{_END}"""


def _promise(training: Training) -> str:
    """Return the paragraph on privacy; "" if training was not private."""
    guarantee = training.guarantee
    if guarantee is None:
        return ""
    return f"""
### Differential privacy

Training was (ε, δ)-differentially private, ε = {guarantee.epsilon(training.steps):.4g} and δ = {guarantee.delta:g}, for every row
of its {guarantee.rows} rows: data sets that differ by one row are neighbors. Every step took each row with probability
{guarantee.expected_rows}/{guarantee.rows} (Poisson sampling), and added noise of {guarantee.noise_multiplier:g} times the largest
number of a row. Choices that were made by looking at the rows, such as the learning rate, are not part of the account.

"""


def _cell(value: Any) -> str:
    return (f"{value:g}" if isinstance(value, float) else str(value)).replace("|", "\\|")


def _linked(paper: str) -> str:
    return re.sub(r"\d{4}\.\d{5}|cs/\d{7}", lambda number: f"[{number[0]}](https://arxiv.org/abs/{number[0]})", paper)
