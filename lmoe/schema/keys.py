"""Check keys against the dataclasses, all at once, and suggest the near one."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def near(name: str, allowed: list[str]) -> str:
    """The nearest allowed name as a question, or the list of what is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(sorted(allowed))}"


def unknown_keys(schema: type, given: Mapping[str, Any], prefix: str) -> list[str]:
    """One problem for each key of a nested dict that the dataclass does not have."""
    problems = []
    for key, value in given.items():
        problem = unknown_key(schema, [str(key)], prefix)
        if problem:
            problems.append(problem)
        elif isinstance(value, Mapping) and (inner := _field_type(schema, str(key))) is not None:
            problems += _nested(inner, value, f"{prefix}.{key}" if prefix else str(key))
    return problems


def _nested(inner: Any, value: Mapping[str, Any], prefix: str) -> list[str]:
    if is_dataclass(inner) and isinstance(inner, type):
        return unknown_keys(inner, value, prefix)
    element = _mapping_element(inner)
    if element is None:
        return []
    return [
        problem
        for name, item in value.items()
        if isinstance(item, Mapping)
        for problem in _nested(element, item, f"{prefix}.{name}")
    ]


def unknown_key(schema: type, parts: list[str], prefix: str = "") -> str | None:
    """The problem with a dotted key, or None if the dataclasses have it."""
    current: Any = schema
    for depth, part in enumerate(parts):
        if is_dataclass(current) and isinstance(current, type):
            names = [f.name for f in fields(current)]
            if part not in names:
                where = ".".join([p for p in (prefix, *parts[:depth]) if p])
                full = f"{where}.{part}" if where else part
                return f"{full}: no such key; {near(part, names)}"
            current = _field_type(current, part)
        elif (element := _mapping_element(current)) is not None:
            current = element
        else:
            return None
    return None


def _field_type(schema: type, name: str) -> Any:
    hint = get_type_hints(schema)[name]
    options = [a for a in get_args(hint) if a is not type(None)]
    return options[0] if type(None) in get_args(hint) and len(options) == 1 else hint


def _mapping_element(hint: Any) -> Any:
    return get_args(hint)[1] if get_origin(hint) is dict else None


def leaf_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a tree of dataclasses with its type; a mapping shows as <name>."""
    for f in fields(schema):
        hint = _field_type(schema, f.name)
        path = f"{prefix}{f.name}"
        element = _mapping_element(hint)
        if is_dataclass(hint) and isinstance(hint, type):
            yield from leaf_keys(hint, f"{path}.")
        elif is_dataclass(element) and isinstance(element, type):
            yield from leaf_keys(element, f"{path}.<name>.")
        else:
            yield path, hint
