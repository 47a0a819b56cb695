"""What may be set of a chat template: its variables and its date."""

import math
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from lmoe.files.wording import shown

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
SPECIAL_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
OWN_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", *SPECIAL_TOKENS})
"""Variables that every rendering has already."""
CLOCK = "strftime_now"
"""The function by which templates read the date."""
FUNCTIONS = ("raise_exception", "namespace", "range", "dict", "cycler", "joiner", "lipsum", "loop", "self", "caller")
WORDS = frozenset({"true", "false", "none", "and", "or", "not", "in", "is", "if", "else", *FUNCTIONS})
"""Names that are something else in Jinja."""


def template_problems(kwargs: Mapping[str, Any], day: str | None) -> list[str]:
    """What is wrong with data.template_kwargs and data.template_date, whatever the template."""
    problems = []
    for name, value in kwargs.items():
        key = f"data.template_kwargs.{shown(name)}"
        if name == CLOCK:
            problems.append(f"{key}: data.template_date=YYYY-MM-DD sets the day that a template reads")
        elif name in OWN_NAMES:
            problems.append(f"{key}: every rendering has its own {name} already; leave it out")
        elif not NAME.fullmatch(name) or name.lower() in WORDS:
            problems.append(f"{key}: no name of a variable; give a letter, then letters, digits and _")
        elif (wrong := _no_literal(value)) is not None:
            problems.append(
                f"{key} holds {wrong}; allowed: null, true, false, numbers, text, and lists and mappings of these"
            )
    if day is not None and not is_day(day):
        problems.append(f"data.template_date is {shown(day)}, must be a day such as 2026-01-31")
    return problems


def is_day(text: str) -> bool:
    """Whether a text is a day as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _no_literal(value: Any) -> str | None:
    """What in a value cannot be written into a template, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"the number {value}"
    if value is None or isinstance(value, str | int | float):
        return None
    if isinstance(value, list | tuple):
        return next((wrong for item in value if (wrong := _no_literal(item)) is not None), None)
    if isinstance(value, Mapping):
        if names := [name for name in value if not isinstance(name, str)]:
            return f"the name {shown(names[0])}, which is no text"
        return _no_literal(list(value.values()))
    return f"a {type(value).__name__}"
