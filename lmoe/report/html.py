"""Pages from the templates in pages/: what they are given is shown as text, and a missing value is an error.

A page is one file that asks for nothing. Scripts are plain files of pages/ that stand in it whole, and its policy lets
no other script run. What they read stands in the page as JSON, in which no character can end its element.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lmoe.errors import ConfigError
from lmoe.files.places import exists, expanded, is_dir, is_file

PAGES = Path(__file__).parent / "pages"
GENERATOR = "lmoe"
MARK = f'<meta name="generator" content="{GENERATOR}">'
"""In the head of every page, by which an older one is known that may be written over."""
ENDS_SCRIPT = re.compile(r"</script|<!--", re.IGNORECASE)
"""What a parser of HTML takes for more than a part of a script."""
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


def render(
    template: str, *, scripts: Sequence[str] = (), data: Any = None, asks_server: bool = False, **values: Any
) -> str:
    """Return a page as HTML.

    Args:
        template: a file of pages/.
        scripts: files of pages/ that run at its end, in this order.
        data: what they read by `page.data()` (page.js): lists, dicts, texts and finite numbers; None: nothing.
        asks_server: it may ask the server that it comes from for more.
        values: all that it shows.
    """
    sources = [script_source(name) for name in scripts]
    blocks = [] if data is None else [Markup('<script type="application/json" id="data">%s</script>') % json_text(data)]
    blocks += [Markup("<script>%s</script>") % Markup(source) for source in sources]
    return (
        environment()
        .get_template(template)
        .render(
            generator=GENERATOR,
            policy=policy(sources, asks_server=asks_server),
            script_blocks=Markup("\n").join(blocks),
            **values,
        )
    )


def policy(scripts: Sequence[str], *, asks_server: bool = False) -> str:
    """What a page may load and run: its own style and pictures, and of scripts these texts alone.

    Args:
        scripts: texts of its scripts.
        asks_server: it may ask the server that it comes from, and nothing else.
    """
    digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in scripts]
    allowed = "".join(f" 'sha256-{digest}'" for digest in digests)
    parts = ["default-src 'none'", "style-src 'unsafe-inline'", "img-src 'self' data:"]
    parts += [f"script-src{allowed}"] if allowed else []
    return "; ".join([*parts, *(["connect-src 'self'"] if asks_server else [])])


def script_source(name: str) -> str:
    """The text of a script, as it stands in a page.

    Args:
        name: of a file in pages/.

    Raises:
        ValueError: it would end its own element.
    """
    source = (PAGES / name).read_text(encoding="utf-8")
    if ENDS_SCRIPT.search(source):
        raise ValueError(f"{name} holds </script or <!--, which a script inside a page must not")
    return source


def json_text(data: Any) -> Markup:
    """JSON that may stand inside a script element: no <, > or & is in it, and nothing beyond ASCII."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


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
    if exists(path) and not says_early(path, MARK):
        raise ConfigError(f"`output={output}` exists and is no page of lmoe; name another file")
    return path


def says_early(path: Path, mark: str) -> bool:
    """Whether a file has a text within its first bytes, by which lmoe knows what it has written itself."""
    try:
        if not is_file(path):
            return False
        with path.open("rb") as file:
            return mark.encode() in file.read(HEAD)
    except OSError:
        return False
