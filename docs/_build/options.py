"""The reference of options, docs/options.md, from `ZOConfig` and from the table of what does not combine.

python docs/_build/options.py        # writes docs/options.md
"""

from __future__ import annotations

import re
from dataclasses import Field, fields
from pathlib import Path

from transformers import Seq2SeqTrainingArguments

from zo_hf import ZOConfig
from zo_hf.compatibility import CONFLICTS
from zo_hf.directions.options import DirectionOptions
from zo_hf.estimators.options import EstimatorOptions
from zo_hf.privacy.options import PrivacyOptions
from zo_hf.rewards import EvolutionConfig
from zo_hf.rules.options import RuleOptions
from zo_hf.settings import Settings
from zo_hf.subspaces.options import SubspaceOptions

TARGET = Path(__file__).parents[1] / "options.md"

HEAD = """# Options

`ZOConfig` takes every option of `transformers.TrainingArguments`, and those below. `zo-hf train` and `zo-hf sft` take them
too, as `--name value`. Without a Trainer, `ZerothOrder(model, ...)` takes the options of the method as keywords, without `zo_`.

This page is generated from the source by `python docs/_build/options.py`.
"""

REWARDS = "More options of `EvolutionConfig`, for rewards of generated text"

PARTS = (
    ("What moves", SubspaceOptions),
    ("How losses become projected gradients", EstimatorOptions),
    ("Directions", DirectionOptions),
    ("Rules", RuleOptions),
    ("Privacy", PrivacyOptions),
)


def page() -> str:
    """The text of docs/options.md."""
    ours = {option.name: option for option in fields(ZOConfig)}
    stock = {option.name for option in fields(Seq2SeqTrainingArguments)}
    sections = [HEAD]
    changed = [name for name in ours if name in stock and name in vars(ZOConfig).get("__annotations__", {})]
    sections.append(_section("Options of Trainer with other defaults", [ours[name] for name in changed]))
    shown = set(stock)
    for title, part in PARTS:
        names = [f"zo_{option.name}" for option in fields(part)]
        sections.append(_section(title, [ours[name] for name in names]))
        shown.update(names)
    names = [f"zo_{option.name}" for option in fields(Settings) if f"zo_{option.name}" not in shown]
    names.remove("zo_seed")
    sections.append(_section("Projected gradients and probes", [ours[name] for name in names]))
    shown.update(names)
    rest = [option for name, option in ours.items() if name not in shown]
    sections.append(_section("Budgets, checkpoints, processes and stability", rest))
    own = vars(EvolutionConfig)["__annotations__"]
    sections.append(_section(REWARDS, [option for option in fields(EvolutionConfig) if option.name in own]))
    sections.append(_conflicts())
    return "\n".join(sections)


def _section(title: str, options: list[Field]) -> str:
    lines = [f"## {title}", "", "| option | default | |", "|---|---|---|"]
    lines += [f"| `{option.name}` | `{option.default}` | {_cell(option.metadata['help'])} |" for option in options]
    return "\n".join([*lines, ""])


def _conflicts() -> str:
    lines = [
        "## What does not combine",
        "",
        "Each row is refused before training, with the way out. `...` stands for the values that the reason is about.",
        "",
        "| option | with | why | instead |",
        "|---|---|---|---|",
    ]
    for conflict in CONFLICTS:
        why = conflict.why or "it has no effect"
        lines.append(
            f"| `{_cell(conflict.this)}` | {_cell(conflict.that)} | {_cell(why)} | {_cell(conflict.instead)} |"
        )
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return re.sub(r"\{\w+\}", "...", text).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
