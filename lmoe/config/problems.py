"""Problems of a config: collected as text, raised together."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, TypeVar

from lmoe.config.limits import LARGEST_OF_KEY, LARGEST_OF_OTHER_KEYS, LEAST_SIZE, MOST_CHARACTERS, MOST_SIZE, REASONS
from lmoe.errors import ConfigError
from lmoe.files.small_file import INTERPOLATION
from lmoe.files.wording import shown

Section = TypeVar("Section")


def raise_problems(problems: list[str]) -> None:
    """Raise all problems at once, if there are any.

    Raises:
        ConfigError: if there is any problem; its message lists them all.
    """
    if problems:
        raise ConfigError(problems)


def at_least(value: float, least: float, key: str) -> list[str]:
    """One problem if a value is too small."""
    return [] if value >= least else [f"{key} is {value}, must be at least {least}"]


def above_zero(value: float | None, key: str) -> list[str]:
    """One problem if a value is given and not above 0."""
    return [] if value is None or value > 0 else [f"{key} is {value}, must be above 0"]


def size_problems(config: Any, prefix: str = "") -> list[str]:
    """One problem for each number of a config dataclass that nothing can compute with, and each endless text.

    Args:
        config: dataclass.
        prefix: its dotted key.
    """
    return [problem for key, value in _values(config, prefix) if (problem := _size_problem(key, value))]


def within_sizes(config: Section, prefix: str = "") -> tuple[list[str], Section]:
    """The problems of sizes, and the same config with defaults in place of what has one."""
    problems = size_problems(config, prefix)
    return problems, _replaced(config, prefix, set(keys_named(problems))) if problems else config


def keys_named(problems: list[str]) -> list[str]:
    """The key that each of size_problems begins with; of an item of a list, that of the list."""
    return [problem.split(" ")[0].split("[")[0] for problem in problems]


def _replaced(config: Any, key: str, bad: set[str]) -> Any:
    values = {}
    for spec in fields(config):
        value, inner = getattr(config, spec.name), f"{key}.{spec.name}" if key else spec.name
        if inner in bad:
            value = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        elif is_dataclass(value):
            value = _replaced(value, inner, bad)
        elif isinstance(value, dict):
            value = {n: _replaced(v, f"{inner}.{n}", bad) if is_dataclass(v) else v for n, v in value.items()}
        values[spec.name] = value
    return replace(config, **values)


def _size_problem(key: str, value: float | str) -> str | None:
    if isinstance(value, str):
        if INTERPOLATION in value:
            return f"{key} is {shown(value)}, must be plain text: what is saved with a run holds no ${{…}}"
        most = f"must have at most {MOST_CHARACTERS}"
        return None if len(value) <= MOST_CHARACTERS else f"{key} has {len(value)} characters, {most}"
    if isinstance(value, int):
        name = key.split("[")[0]
        most = LARGEST_OF_KEY.get(name, LARGEST_OF_OTHER_KEYS)
        if abs(value) <= most:
            return None
        return f"{key} is {shown(value)}, must be at most {most}" + (f": {REASONS[name]}" if name in REASONS else "")
    if not math.isfinite(value):
        return f"{key} is {value}, must be a finite number"
    if value and not LEAST_SIZE <= abs(value) <= MOST_SIZE:
        return (
            f"{key} is {value}, must be 0 or between {LEAST_SIZE:g} and {MOST_SIZE:g} in size, which float32 can hold"
        )
    return None


def _values(value: Any, key: str) -> Iterator[tuple[str, float | str]]:
    """The numbers and texts of a config by key."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        yield key, value
    elif is_dataclass(value):
        for f in fields(value):
            yield from _values(getattr(value, f.name), f"{key}.{f.name}" if key else f.name)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _values(entry, f"{key}.{name}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _values(entry, f"{key}[{number}]")


def without_effect(key: str, why: str) -> str:
    """The problem of a setting that the user changed and that cannot act."""
    return f"{key} has no effect {why}; leave it out"


def changed_keys(settings: Any, default: Any) -> list[str]:
    """Names of the fields in which a dataclass differs from another one of its type."""
    return [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(default, f.name)]
