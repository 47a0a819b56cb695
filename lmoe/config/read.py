"""Plain values into the dataclasses of a config: what cannot be is said for every key at once, and hides nothing else.

What a value may be written as is what OmegaConf takes: "8" is a whole number, 20 is text where text is asked for.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmoe.config.keys import near, near_choice
from lmoe.config.limits import MOST_CHARACTERS
from lmoe.files.wording import LONGEST_REASON, shown

Section = TypeVar("Section")
REQUIRED = "???"
"""What a file of conf/ says of a key that the user must set."""
TRUE, FALSE = ("yes", "y", "on", "true"), ("no", "n", "off", "false")
ONE = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
MANY = {
    int: "a list of whole numbers, such as [1,2]",
    float: "a list of numbers, such as [0.9,0.99]",
    str: "a list of texts, such as [one,two]",
}


@dataclass(slots=True)
class Reading:
    """What was found while values were read.

    Args:
        problems: one line each.
        unread: keys that have their default, because what was given for them cannot be; of a key inside an entry of a
            mapping, such as a phase, the entry too.
    """

    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def refuse(self, key: str, problem: str, *, entry: str = "") -> None:
        """Note that a key has its default, and why."""
        self.problems.append(problem)
        self.unread += [key, entry] if entry else [key]


class Unread:
    """In place of a value that has been refused already."""


UNREAD = Unread()


def read_section(schema: type[Section], given: Any, *, prefix: str = "") -> tuple[Section, Reading]:
    """A dataclass from a mapping or an OmegaConf config, defaults in place of what cannot be read.

    Args:
        schema: the dataclass.
        given: by key; a DictConfig may hold interpolations.
        prefix: dotted key of the section, for messages.
    """
    reading = Reading()
    plain = _plain(given, prefix, reading)
    return _section(schema, plain, prefix, reading, ""), reading


def independent(problems: Iterable[str], unread: Iterable[str]) -> list[str]:
    """Problems without those that name a key which has its default only because its own value was refused."""
    names = [re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w)") for key in unread]
    return [problem for problem in problems if not any(name.search(problem) for name in names)]


def _plain(given: Any, key: str, reading: Reading) -> Any:
    """The same without OmegaConf, interpolations resolved."""
    if not isinstance(given, DictConfig | ListConfig):
        return given
    numbered = isinstance(given, ListConfig)
    names: Any = range(len(given)) if numbered else list(given.keys())
    values = []
    for name in names:
        inner = f"{key}[{name}]" if numbered else joined(key, name)
        values.append(_resolved(given, name, inner, reading))
    return values if numbered else dict(zip(names, values, strict=True))


def _resolved(parent: Any, name: Any, key: str, reading: Reading) -> Any:
    if OmegaConf.is_missing(parent, name):
        return REQUIRED
    try:
        value = parent[name]
    except (OmegaConfBaseException, RecursionError) as error:
        written = OmegaConf.to_container(parent, resolve=False)
        reason = "it refers to itself" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        reading.refuse(key, f"{key} is {shown(written[name])}, which cannot be resolved: {reason}")  # type: ignore[index, call-overload]
        return UNREAD
    return _plain(value, key, reading)


def joined(prefix: str, name: object) -> str:
    """The dotted key of a name in a section."""
    return f"{prefix}.{name}" if prefix else str(name)


def _section(schema: type[Section], given: Any, prefix: str, reading: Reading, entry: str) -> Section:
    hints = _hints(schema)
    if not isinstance(given, Mapping):
        if given is not UNREAD:
            reading.refuse(prefix, no_mapping(schema, given, prefix or "the config"), entry=entry)
        given = {}
    for name in given:
        if name not in hints:
            key = joined(prefix, name)
            reading.refuse(key, f"{shown(key, longest=LONGEST_REASON)}: no such key; {near(str(name), list(hints))}")
    values: dict[str, Any] = {}
    for spec in fields(schema):  # type: ignore[arg-type]
        if spec.name in given:
            key = joined(prefix, spec.name)
            values[spec.name] = _value(hints[spec.name], given[spec.name], key, spec, reading, entry)
    return schema(**values)


def _value(hint: Any, given: Any, key: str, spec: Field[Any], reading: Reading, entry: str) -> Any:
    """What a field is set to."""
    if given is UNREAD:
        return _default(spec)
    if isinstance(given, str) and given == REQUIRED:
        reading.refuse(key, f"{key} is required", entry=entry)
        return _default(spec)
    inner, optional = without_none(hint)
    if given is None and optional:
        return None
    if inner is Any:
        return given
    if is_dataclass(inner) and isinstance(inner, type):
        return _section(inner, given, key, reading, entry)
    if get_origin(inner) is dict:
        return _mapping(get_args(inner)[1], given, key, reading)
    try:
        if get_origin(inner) is list:
            return _items(get_args(inner)[0], given, key, optional)
        return _leaf(inner, given, key, optional)
    except ValueError as error:
        reading.refuse(key, str(error), entry=entry)
        return _default(spec)


def value_problems(hint: Any, given: Any, key: str) -> list[str]:
    """The problems of one value by its type."""
    reading = Reading()
    spec: Any = field(default=None)
    _value(hint, given, key, spec, reading, "")
    return reading.problems


def no_mapping(hint: Any, given: Any, key: str) -> str:
    """The problem of a section, or of a mapping by name, that is given something else."""
    such = f"with keys such as {', '.join(list(_hints(hint))[:3])}" if is_dataclass(hint) else "by name: {name: …}"
    return f"{key} is {shown(given)}, must be a mapping {such}"


def _mapping(element: Any, given: Any, key: str, reading: Reading) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        reading.refuse(key, no_mapping(dict, given, key))
        return {}
    entries = {}
    for name, value in given.items():
        inner = joined(key, name)
        if not isinstance(name, str):
            reading.refuse(inner, f"{key}: the name {shown(name)} must be text")
        elif len(name) > MOST_CHARACTERS:
            reading.refuse(inner, f"{key}: the name {shown(name)} must have at most {MOST_CHARACTERS:,} characters")
        elif is_dataclass(element) and isinstance(element, type):
            entries[name] = _section(element, value, inner, reading, inner)
        elif element is Any and value is not UNREAD:
            entries[name] = value
        elif value is not UNREAD:
            try:
                entries[name] = _leaf(element, value, inner, optional=False)
            except ValueError as error:
                reading.refuse(inner, str(error))
    return entries


def _items(element: Any, given: Any, key: str, optional: bool) -> list[Any]:
    """The items of a list in a config, each of the wanted type.

    Raises:
        ValueError: the problem.
    """
    if not isinstance(given, list | tuple):
        many = MANY.get(element) or f"a list of {', '.join(element)}"
        raise ValueError(f"{key} is {shown(given)}, must be {many}{' or null' if optional else ''}")
    items = [(number, item) for number, item in enumerate(given) if item is not UNREAD]
    return [_leaf(element, item, f"{key}[{number}]", optional=False) for number, item in items]


def _leaf(kind: Any, given: Any, key: str, optional: bool) -> Any:
    """One value of a config in the wanted type.

    Raises:
        ValueError: the problem.
    """
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _choice(kind, given, key, optional)
    value = _CONVERT[kind](given)
    if value is None:
        raise ValueError(f"{key} is {shown(given)}, must be {ONE[kind]}{' or null' if optional else ''}")
    return value


def _choice(kind: type[StrEnum], given: Any, key: str, optional: bool) -> StrEnum:
    if isinstance(given, kind):
        return given
    name = str(given).removeprefix(f"{kind.__name__}.")
    if isinstance(given, str) and name in kind.__members__:
        return kind[name]
    allowed = ", ".join([*kind, *(["null"] if optional else [])])
    close = near_choice(kind, str(shown(given)))
    raise ValueError(f"{key} is {shown(given)}; allowed: {allowed}" + (f"; did you mean {close}?" if close else ""))


def _whole(given: Any) -> int | None:
    if type(given) is int:
        return given
    try:
        return int(given) if isinstance(given, str) else None
    except ValueError:
        return None


def _number(given: Any) -> float | None:
    if type(given) not in (int, float) and not isinstance(given, str):
        return None
    try:
        return float(given)
    except ValueError:
        return None
    except OverflowError:
        return float("inf")  # of a whole number without end: refused as such


def _text(given: Any) -> str | None:
    return str(given) if given is not None and not isinstance(given, Mapping | list | tuple | bytes) else None


def _switch(given: Any) -> bool | None:
    if isinstance(given, bool | int):
        return bool(given)
    if not isinstance(given, str):
        return None
    if (number := _whole(given)) is not None:
        return bool(number)
    return True if given.lower() in TRUE else False if given.lower() in FALSE else None


_CONVERT: dict[Any, Any] = {int: _whole, float: _number, str: _text, bool: _switch}


def _default(spec: Field[Any]) -> Any:
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type that a field may have beside null, and whether it may be null."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    options = [option for option in get_args(hint) if option is not type(None)]
    assert len(options) == 1, hint
    return options[0], True


@cache
def _hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {spec.name: hints[spec.name] for spec in fields(schema)}  # type: ignore[arg-type]
