"""What the site has beside the files of docs/: a page for every method, pages of notebooks, the list of public names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# MkDocs puts this folder on the path while it imports hooks, and takes it away afterwards.
import method_pages
import notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PUBLIC_NAMES = "<!-- public names -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    assert config.nav is not None
    methods: list[Any] = next(section["Methods"] for section in config.nav if "Methods" in section)
    for kind in method_pages.OPTIONS:
        pages = [page for page in method_pages.method_pages() if page.kind == kind]
        methods.append({kind.capitalize(): [{page.title: page.path} for page in pages]})
    config.nav = _with_notebooks_as_pages(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages that no file of docs/ has."""
    for page in method_pages.method_pages():
        files.append(File.generated(config, page.path, content=page.markdown()))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = Path(file.src_uri)
        text, figures = notebooks.as_markdown(json.loads(file.content_string), path.stem)
        files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=text))
        for name, image in figures.items():
            files.append(File.generated(config, path.with_name(name).as_posix(), content=image))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what depends on the code, and lead links to notebooks to their pages."""
    if page.file.src_uri == "methods.md":
        markdown = method_pages.linked_table(markdown)
    if PUBLIC_NAMES in markdown:
        markdown = markdown.replace(PUBLIC_NAMES, _public_names())
    return re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", markdown)


def _public_names() -> str:
    import zo_hf

    names = [name for name in zo_hf.__all__ if not name.startswith("__")]
    instead = {
        "ZerothOrder": "## ZerothOrder\n\nSee [engine](engine.md).",
        # Its signature is all of its options, with their help.
        "ZOConfig": "::: zo_hf.ZOConfig\n    options: { show_signature: false }\n\nSee [every option](../options.md).",
    }
    names.sort(key=lambda name: (name == "ZerothOrder", name.startswith("ZOSeq"), name))
    return "\n\n".join(instead.get(name, f"::: zo_hf.{name}") for name in names)


def _with_notebooks_as_pages(nav: Any) -> Any:
    """The navigation with the page that is made of a notebook in its place."""
    if isinstance(nav, str):
        return nav.removesuffix(".ipynb") + ".md" if nav.endswith(".ipynb") else nav
    if isinstance(nav, dict):
        return {title: _with_notebooks_as_pages(entry) for title, entry in nav.items()}
    return [_with_notebooks_as_pages(entry) for entry in nav]
