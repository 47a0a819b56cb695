"""Pages from the templates in pages/: what they are given is shown as text, and a missing value is an error."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmoe.errors import ConfigError
from lmoe.files.places import exists, expanded, is_dir, is_file

PAGES = Path(__file__).parent / "pages"
GENERATOR = "lmoe"
MARK = f'<meta name="generator" content="{GENERATOR}">'
"""In the head of every page, by which an older one is known that may be written over."""
HEAD = 1000
"""Bytes in which the mark stands."""


@cache
def environment() -> Environment:
    """Where the templates are and how they are rendered."""
    return Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """Return a page as HTML.

    Args:
        template: a file of pages/.
        values: all that it shows.
    """
    return environment().get_template(template).render(generator=GENERATOR, **values)


def page_place(output: str) -> Path:
    """The path of a page that may be written: its folder is there, and in its place nothing but an older page.

    Args:
        output: ends in .html, may begin with `~`.

    Raises:
        ConfigError: another name, no such folder, or something else in its place.
    """
    path = expanded(output)
    if path.suffix.lower() != ".html":
        raise ConfigError(f"`output={output}` is written as a page; name a file that ends in .html")
    if not is_dir(path.parent):
        raise ConfigError(f"`output={output}`: there is no folder {path.parent}; make it, or name another place")
    if exists(path) and not _is_page(path):
        raise ConfigError(f"`output={output}` exists and is no page of lmoe; name another file")
    return path


def _is_page(path: Path) -> bool:
    try:
        if not is_file(path):
            return False
        with path.open("rb") as file:
            return MARK.encode() in file.read(HEAD)
    except OSError:
        return False
