"""Check keys against the dataclasses, all at once, and suggest the near one."""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

from lmoe.files.wording import LONGEST_REASON, shown

USUAL_NAMES = {
    "fp32": "float32",
    "float": "float32",
    "32": "float32",
    "fp16": "float16",
    "half": "float16",
    "16": "float16",
    "bf16": "bfloat16",
    "8bit": "int8",
    "4bit": "nf4",
    "int4": "nf4",
    "fp4": "nf4",
    "cuda": "gpu",
    "fsdp": "fsdp2",
}
"""What others call a choice of ours."""


def near_choice(choices: type[StrEnum], name: str) -> str | None:
    """The choice that was perhaps meant."""
    usual = USUAL_NAMES.get(name.lower())
    if usual in tuple(choices):
        return usual
    return next(iter(difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.6)), None)


def near(name: str, allowed: list[str]) -> str:
    """The nearest allowed name as a question, or the list of what is allowed."""
    close = [each for each in allowed if each.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(sorted(allowed))}"


def unknown_key(schema: type, parts: list[str], prefix: str = "") -> str | None:
    """The problem with a dotted key, or None if the dataclasses have it."""
    current: Any = schema
    for depth, part in enumerate(parts):
        if is_dataclass(current) and isinstance(current, type):
            names = [f.name for f in fields(current)]
            if part not in names:
                where = ".".join([p for p in (prefix, *parts[:depth]) if p])
                full = f"{where}.{part}" if where else part
                return f"{shown(full, longest=LONGEST_REASON)}: no such key; {near(part, names)}"
            current = field_type(current, part)
        elif (element := _mapping_element(current)) is not None:
            current = element
        elif current is Any or (get_origin(current) is list and part.isdecimal()):
            return None
        else:
            where = ".".join([p for p in (prefix, *parts[:depth]) if p])
            return f"{where}.{part}: no such key; {where} is one value"
    return None


def target(schema: type, key: str) -> Any:
    """The type of a key that is there: a dataclass, a mapping, or that of a value."""
    current: Any = schema
    for part in key.split("."):
        if is_dataclass(current) and isinstance(current, type):
            current = field_type(current, part)
        else:
            current = _mapping_element(current) or Any
    return current


def is_section(hint: Any) -> bool:
    """Whether a type holds keys of its own: a dataclass or a mapping."""
    return (is_dataclass(hint) and isinstance(hint, type)) or get_origin(hint) is dict


def field_type(schema: type, name: str) -> Any:
    """The type of a field; of one that may be null, the other one."""
    hint = get_type_hints(schema)[name]
    options = [a for a in get_args(hint) if a is not type(None)]
    return options[0] if type(None) in get_args(hint) and len(options) == 1 else hint


def _mapping_element(hint: Any) -> Any:
    return get_args(hint)[1] if get_origin(hint) is dict else None


def leaf_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a tree of dataclasses with its type; a mapping shows as <name>."""
    for f in fields(schema):
        hint = field_type(schema, f.name)
        path = f"{prefix}{f.name}"
        element = _mapping_element(hint)
        if is_dataclass(hint) and isinstance(hint, type):
            yield from leaf_keys(hint, f"{path}.")
        elif is_dataclass(element) and isinstance(element, type):
            yield from leaf_keys(element, f"{path}.<name>.")
        else:
            yield path, hint
