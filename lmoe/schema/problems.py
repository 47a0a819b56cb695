"""Problems of a config: collected as text, raised together."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from lmoe.errors import ConfigError


def raise_problems(problems: list[str]) -> None:
    """
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


def not_finite(config: Any) -> list[str]:
    """One problem for each number of a config dataclass that is infinite or none."""
    return [f"{key} is {value}, must be a finite number" for key, value in _numbers(config, "")]


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif is_dataclass(value):
        for f in fields(value):
            yield from _numbers(getattr(value, f.name), f"{key}.{f.name}" if key else f.name)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _numbers(entry, f"{key}.{name}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _numbers(entry, f"{key}[{number}]")


def without_effect(key: str, why: str) -> str:
    """The problem of a setting that the user changed and that cannot act."""
    return f"{key} has no effect {why}; leave it out"


def changed_keys(settings: Any, default: Any) -> list[str]:
    """Names of the fields in which a dataclass differs from another one of its type."""
    return [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(default, f.name)]
