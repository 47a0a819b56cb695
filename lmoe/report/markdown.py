"""Markdown of the cards that lie beside models."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

SIGNS = re.compile(r"([\\`*\[\]<>|#&~$]|(?<!\w)_|_(?!\w))")
"""By which Markdown, HTML and formulas in Markdown do more than show text; an underscore inside a word does not."""


def front_matter(metadata: Mapping[str, Any]) -> list[str]:
    """The lines of YAML at the head of a card, which the hub reads."""
    written = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return ["---", *written.splitlines(), "---"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table.

    Args:
        header: of the columns.
        rows: cells, as Markdown.
        left: so many of the first columns are texts; the others are numbers, and stand on the right.
    """
    rule = "|" + "".join("---|" if column < left else "---:|" for column in range(len(header)))
    return [_line(header), rule, *(_line(row) for row in rows)]


def plain(text: object) -> str:
    """Text that came from elsewhere, such as a name, so that it is shown as it is, in one line."""
    return SIGNS.sub(r"\\\1", " ".join(str(text).split()))


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
