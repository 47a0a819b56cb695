"""What can be set of a chat template: variables that are written into it, and what it reads at all."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import meta
from jinja2.exceptions import TemplateError

from lmoe.data.chats.render_limit import environment
from lmoe.errors import DataError
from lmoe.rules.template import CLOCK, OWN_NAMES, template_problems

LITERALS = {None: "none", True: "true", False: "false"}


def with_settings(source: str, settings: Mapping[str, Any]) -> str:
    """The template with defaults for variables of it, which then hold wherever it is used; who renders it with another
    value still gets that.

    A template that begins with these very settings stays as it is.

    Raises:
        DataError: a name that cannot be set, or that the template does not read.
    """
    if problems := template_problems(settings, None):
        raise DataError("; ".join(problems))
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"  # which Jinja drops
        for name, value in settings.items()
    ]
    head = "".join(lines)
    if source.startswith(head):
        return source
    read = variables_of(source)
    if unread := [name for name in settings if name not in read]:
        free = sorted(read - OWN_NAMES - {CLOCK})
        reads = f"it reads {', '.join(free)}" if free else "it reads no variable that could be set"
        raise DataError(f"data.template_kwargs.{unread[0]}: the chat template does not read {unread[0]}; {reads}")
    return head + source


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return LITERALS[value] if value is None or isinstance(value, bool) else repr(value)


@lru_cache(maxsize=8)
def variables_of(source: str) -> frozenset[str]:
    """Names that a template reads and does not make itself, with that of the clock; none of one that cannot be parsed.

    Among them may be a name that the template makes in one branch only.
    """
    known = environment()
    del known.globals[CLOCK]  # what an environment has counts as declared
    try:
        return frozenset(meta.find_undeclared_variables(known.parse(source)))
    except (TemplateError, RecursionError):
        return frozenset()


def reads_clock(source: str | None) -> bool:
    """Whether a template asks for the date."""
    return source is not None and CLOCK in variables_of(source)
