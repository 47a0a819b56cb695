"""Dataclasses of flags as options of a command."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def flags_as_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` as Typer takes it, with an option a field where a parameter is a dataclass of flags.

    A field is declared as Typer wants it: `seed: Annotated[int, typer.Option(help=…)] = 0`. One that the verb has as a
    parameter too stands where the verb has it, and is in the dataclass as well.
    """
    hints = get_type_hints(verb, include_extras=True)
    own = signature(verb).parameters
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    options: list[Parameter] = []
    for name, parameter in own.items():
        if name in groups:
            options += (option for option in _options(groups[name]) if option.name not in own)
        else:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(verb)
    def command(**given: Any) -> None:
        made = {
            name: group(**{field.name: given[field.name] for field in fields(group)}) for name, group in groups.items()
        }
        verb(**{name: given[name] for name in own if name not in groups}, **made)

    command.__signature__ = Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def _options(group: type) -> Iterator[Parameter]:
    """A parameter for each field."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
