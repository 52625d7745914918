"""What pages of the site are given besides their text: sections of README, and the objectives by family."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from unirl_kernels import objectives

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FIRST = ("likelihood", "policy", "surrogates", "importance", "sequence", "group", "batch", "preference", "pairs")
"""Families in the order in which the page has them; the others follow by their names."""
ELSEWHERE = {"aggregate", "loss", "tokens"}
"""Modules whose classes the reference has."""


def on_page_markdown(markdown: str, **context: Any) -> str:
    """A line ``{{ README: Install }}`` becomes that section, ``{{ objectives }}`` the families."""
    markdown = re.sub(r"^\{\{ README: (.+) \}\}$", lambda found: section(found[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"^\{\{ objectives \}\}$", lambda found: families(), markdown, flags=re.MULTILINE)


def section(title: str) -> str:
    """The text of a section of README, without its heading; links into the repository become plain text.

    Raises:
        ValueError: when README has no such section.
    """
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md must have a section {title!r}")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", found[1]).strip()


def families() -> str:
    """A heading for each module of objectives, and an entry for each class in it."""
    of_module: dict[str, list[type]] = {}
    for value in (getattr(objectives, name) for name in objectives.__all__):
        if inspect.isclass(value):
            of_module.setdefault(value.__module__, []).append(value)
    names = {path: path.rpartition(".")[2] for path in of_module}
    order = sorted(
        (path for path in of_module if names[path] not in ELSEWHERE),
        key=lambda path: (FIRST.index(names[path]) if names[path] in FIRST else len(FIRST), path),
    )
    return "\n\n".join(family(path, of_module[path]) for path in order)


def family(path: str, classes: list[type]) -> str:
    """The module's docstring, and its classes in their order."""
    title = path.rpartition(".")[2].capitalize()
    ordered = sorted(classes, key=lambda value: inspect.getsourcelines(value)[1])
    entries = [f"::: {path}.{value.__qualname__}" for value in ordered]
    return "\n\n".join([f"## {title}", inspect.getdoc(inspect.getmodule(classes[0])) or "", *entries])
