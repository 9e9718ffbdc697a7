"""Every block of code in the README and on the site runs, or is parsed, or says why it is not.

    <!-- not run: needs the hub -->             on the line before a block: it is not run; Python must still parse
    <!-- given: model, train_dataset -->        names that it uses and `given.py` defines

Blocks of Python on one page run one after another in one namespace and an empty folder, without a network; training runs
are cut to a few steps. Commands are parsed by their own parsers.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.docs.commands import check, words_of
from tests.docs.given import GIVEN
from tests.docs.pages import Block, blocks, name_of, prose, sources
from zo_hf import ZOConfig
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.rules import RULES
from zo_hf.subspaces import SUBSPACES

LANGUAGES = ("python", "bash", "text", "yaml", "json", "")
STEPS, FORWARD_PASSES = 4, 40
PAGES = {name_of(path): path.read_text(encoding="utf-8") for path in sources()}
PYTHON = [name for name, text in PAGES.items() if any(block.language == "python" for block in blocks(text))]
COMMANDS = [
    pytest.param(block, id=f"{name}:{block.line}")
    for name, text in PAGES.items()
    for block in blocks(text)
    if block.language == "bash" and not block.not_run
]


@pytest.fixture
def _a_page_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty folder, registries that are as before afterwards, and runs of a few steps on the CPU that report nothing."""
    monkeypatch.chdir(tmp_path)
    before = [(registry, dict(registry)) for registry in (ESTIMATORS, RULES, DISTRIBUTIONS, SUBSPACES)]
    read = ZOConfig.__post_init__

    def short(config: ZOConfig) -> None:
        config.use_cpu, config.report_to, config.disable_tqdm = True, [], True
        if config.zo_max_forward_passes is None:
            config.max_steps = STEPS
        else:
            config.zo_max_forward_passes = min(config.zo_max_forward_passes, FORWARD_PASSES)
        config.save_steps = min(config.save_steps, STEPS)
        read(config)

    monkeypatch.setattr(ZOConfig, "__post_init__", short)
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("_a_page_of_its_own")
@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page: str) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(PAGES[page]):
            if block.language == "python":
                run(page, block, names)


def run(page: str, block: Block, names: dict[str, Any]) -> None:
    """Run a block in a namespace; one that is not run is only parsed."""
    where = f"{page}:{block.line}"
    tree = ast.parse(block.text, where)
    if block.not_run:
        return
    unknown = [name for name in block.given if name not in GIVEN]
    assert not unknown, f"{where} is given {unknown}, which tests/docs/given.py does not define"
    names |= {name: GIVEN[name]() for name in block.given}
    # Line numbers of a traceback are then those of the page.
    exec(compile(ast.increment_lineno(tree, block.line), where, "exec"), names)


@pytest.mark.parametrize("block", COMMANDS)
def test_commands_are_what_their_parsers_take(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in words_of(block.text):
        check(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: str) -> None:
    for block in blocks(PAGES[page]):
        assert block.language in LANGUAGES, f"{page}:{block.line} is in {block.language!r}"
        assert not block.given or block.language == "python", f"{page}:{block.line} is no Python"
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "json":
            json.loads(block.text)
    for line in prose(PAGES[page]).split("\n"):
        assert not line.startswith(("    python", "    zo-hf", "    accelerate")), f"{page}: fence {line.strip()!r}"
        assert not line.startswith(("<!-- not run", "<!-- given")) or line.endswith("-->"), f"{page}: {line}"


def test_marks_are_read() -> None:
    text = "<!-- not run: needs the hub -->\n```python\nx\n```\n\n<!-- given: model, base -->\n````text\n```\n````\n"
    first, second = blocks(text)
    assert (first.not_run, first.text, first.line) == ("needs the hub", "x", 2)
    assert (second.given, second.text, second.language) == (("model", "base"), "```", "text")


@pytest.mark.parametrize(
    "command",
    [
        "zo-hf train --no_such_option",
        "zo-hf no-such-command",
        "zo-hf bench --shape no-such-shape",
        "python3 run.py no-such-command",
        "python recipes/no_such_recipe.py",
        "python recipes/cocd_digits.py --no-such-option",
        "accelerate launch --config_file recipes/no_such.yaml recipes/opt_sst2.py",
        "accelerate launch recipes/opt_sst2.py --zo_estimator no_such_estimator",
        "no-such-program",
    ],
)
def test_a_wrong_command_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(command.split(), monkeypatch)


def test_variables_comments_and_continued_lines() -> None:
    text = 'A="x y"\nB=1 zo-hf methods --a $A \\\n    --b "c d"  # e\n'
    assert words_of(text) == [["zo-hf", "methods", "--a", "x", "y", "--b", "c d"]]
