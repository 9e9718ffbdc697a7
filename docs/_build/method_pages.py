"""One page for every module that holds a method, made from its docstring.

A module holds a method if one of its classes has an `about`. The page has the facts of `zo-hf methods`, the docstring with
the paper and its formula, and the reference of the classes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import dedent

from zo_hf.method_info import Method

#: What a page is about, by the package of its module; the option that chooses among its methods.
OPTIONS = {
    "estimators": "zo_estimator",
    "directions": "zo_direction",
    "rules": "zo_rule",
    "subspaces": "zo_subspace",
}
# Base classes of all methods of a kind: what they say is for whoever writes a method.
_ROOTS = {
    "zo_hf.estimators.estimator",
    "zo_hf.directions.distribution",
    "zo_hf.rules.rule",
    "zo_hf.subspaces.subspace",
}
_FOLDER = "methods"


@dataclass(frozen=True)
class MethodPage:
    """The page of one module.

    Args:
        kind: the package of the module, a key of `OPTIONS`.
        module: its full name.
        classes: those of its classes that are methods, in the order of the source.
    """

    kind: str
    module: str
    classes: tuple[type, ...]

    @property
    def path(self) -> str:
        """Where the page is, below docs/."""
        return f"{_FOLDER}/{self.kind}/{self.module.rpartition('.')[2]}.md"

    @property
    def title(self) -> str:
        """The names that the option takes."""
        return ", ".join(_name(kind) for kind in self.classes)

    def markdown(self) -> str:
        """The page."""
        lead, _, body = (inspect.getdoc(importlib.import_module(self.module)) or "").partition("\n\n")
        parts = [f"# {', '.join(f'`{_name(kind)}`' for kind in self.classes)}", prose(lead)]
        parts += [_facts(self.kind, kind) for kind in self.classes]
        parts += [prose(body)] if body else []
        for module in self._shared():
            page = page_of(module)
            if page is not None:
                parts.append(f"It builds on [{page.title}](../../{page.path}).")
            else:
                text = inspect.getdoc(importlib.import_module(module)) or ""
                parts += [f"## Shared: `{module.rpartition('.')[2]}.py`", prose(text)]
        parts.append(f"## Source\n\n`{self.module.replace('.', '/')}.py`")
        parts += [f"::: {self.module}.{kind.__qualname__}" for kind in self.classes]
        return "\n\n".join(parts) + "\n"

    def _shared(self) -> list[str]:
        """Modules of base classes that say something of their own, nearest first."""
        bases = [base.__module__ for kind in self.classes for base in kind.__mro__[1:]]
        packages = tuple(f"zo_hf.{kind}." for kind in OPTIONS)
        own = {self.module, *_ROOTS}
        return [module for module in dict.fromkeys(bases) if module.startswith(packages) and module not in own]


@cache
def method_pages() -> tuple[MethodPage, ...]:
    """All pages: in the order of the registries, then what no registry has."""
    pages: dict[str, MethodPage] = {}
    for kind in OPTIONS:
        package = importlib.import_module(f"zo_hf.{kind}")
        registry = next(value for name, value in vars(package).items() if name.isupper() and _is_registry(value))
        modules = dict.fromkeys(entry.__module__ for entry in registry.values())
        modules |= dict.fromkeys(
            f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)
        )
        for module in modules:
            classes = tuple(_methods_in(module))
            if classes and module not in pages:
                pages[module] = MethodPage(kind, module, classes)
    return tuple(pages.values())


def page_of(module: str) -> MethodPage | None:
    """The page of a module; None if it has none."""
    return next((page for page in method_pages() if page.module == module), None)


def linked_table(markdown: str) -> str:
    """The tables of `zo-hf methods`, each name a link to its page; the page with the tables is docs/methods.md."""
    for page in method_pages():
        for kind in page.classes:
            name = re.escape(f"| `{_name(kind)}` |")
            # Two tables have no name in common, other than that of the table it stands in.
            section = rf"(^## [^\n]*`{OPTIONS[page.kind]}`.*?)({name})"
            link = rf"\g<1>| [`{_name(kind)}`]({page.path}) |"
            markdown = re.sub(section, link, markdown, count=1, flags=re.DOTALL | re.MULTILINE)
    return markdown


def prose(docstring: str) -> str:
    """Markdown of a docstring: formulas, which are indented or set in columns, become blocks of code."""
    blocks: list[tuple[bool, str]] = []
    for block in re.split(r"\n\s*\n", docstring.rstrip()):
        lines = block.split("\n")
        is_code = all(line.startswith("    ") for line in lines) or all(
            re.search(r"\S {3,}\S", line) for line in lines
        )
        text = dedent(block) if is_code else _inline(block)
        if is_code and blocks and blocks[-1][0]:
            blocks[-1] = (True, f"{blocks[-1][1]}\n\n{text}")
        else:
            blocks.append((is_code, text))
    return "\n\n".join(f"```text\n{text}\n```" if is_code else text for is_code, text in blocks)


def _inline(text: str) -> str:
    parts = text.split("`")
    for i in range(0, len(parts), 2):  # outside of backticks
        part = re.sub(r"([*\[\]_])", r"\\\1", parts[i]).replace("<", "&lt;")
        part = re.sub(r"\b\d{4}\.\d{5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", part)
        parts[i] = re.sub(r"\bdocs/(\S+?)\.md\b", lambda m: _page(m.group(1).replace("\\", "")), part)
    return "`".join(parts)


def _page(name: str) -> str:
    return f"[{name.rpartition('/')[2].replace('_', ' ')}](../../{name}.md)"


def _facts(kind: str, method: type) -> str:
    about: Method = vars(method)["about"]
    registry_name = _name(method)
    facts = {
        "Option": f"`{OPTIONS[kind]}={registry_name!r}`" if _is_option(kind, registry_name, method) else "",
        "Also called": ", ".join(f"`{alias}`" for alias in getattr(method, "aliases", ())),
        "Paper": _inline(about.paper),
        "Forward passes a step": _inline(about.forwards),
        "Memory beyond the weights": _inline(about.memory) if about.memory != "0" else "none",
        "Needs": _inline(about.needs),
        "More options": ", ".join(f"`zo_{name}`" for name in getattr(method, "uses", ())),
    }
    rows = [f"| {fact} | {value.replace('|', chr(92) + '|')} |" for fact, value in facts.items() if value]
    return "\n".join([f"| `{registry_name}` | |", "| --- | --- |", *rows])


def _is_option(kind: str, name: str, method: type) -> bool:
    package = importlib.import_module(f"zo_hf.{kind}")
    return any(value.get(name) is method for value in vars(package).values() if _is_registry(value))


def _is_registry(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, type) for entry in value.values())


def _name(kind: type) -> str:
    return getattr(kind, "name", kind.__name__)


def _methods_in(module: str) -> Iterator[type]:
    """Classes that a module defines, each with facts of its own."""
    for value in vars(importlib.import_module(module)).values():
        if isinstance(value, type) and value.__module__ == module and isinstance(vars(value).get("about"), Method):
            yield value
