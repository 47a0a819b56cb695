"""Errors that users see: one message, no traceback. An assert is for our own bugs.

A message of the library names no flag. An argument of the function that was called stands in backticks: `max_length`,
or `max_length=900` with what it was given; so does a call that is advised: `lmoe.load(…)`. The command line says its
own flag or key there (lmoe/cli/errors.py). Keys of a config stand without backticks: data.max_length. Where a function
makes a section of a config from its arguments, `keys_renamed` lets errors name the arguments.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class LmoeError(Exception):
    """Base of every error whose message alone tells the user what to do."""

    def without_config(self) -> str:
        """The message for what is no config, such as the arguments of a call."""
        return str(self)


class ConfigError(LmoeError):
    """Every problem of a config at once.

    Args:
        problems: one line each, naming the key, what was got, what is allowed.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"config: {head}\n" + "\n".join(f"  - {p}" for p in self.problems))

    def without_config(self) -> str:
        """The problems without saying that they are of a config: a single one stands alone."""
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems\n" + "\n".join(f"  - {p}" for p in self.problems)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        """Pickled by its problems: an exception is otherwise made anew from its whole message."""
        return type(self), (self.problems,)


class BackboneError(LmoeError):
    """A backbone cannot be loaded, or has no place for what was asked."""


class InjectionError(LmoeError):
    """A plan cannot be made or applied to this model."""


class RoutingError(LmoeError):
    """A router lacks what it decides by, such as the domain of a row."""


class DataError(LmoeError):
    """Rows, templates or caches that cannot be used."""


class CheckpointError(LmoeError):
    """An adapter or a run cannot be read, or does not fit."""


class TrainingError(LmoeError):
    """A run cannot go on: non-finite loss, no memory, no space."""


class DivergedError(TrainingError):
    """A loss or a gradient is no finite number; the same run would come to it once more."""


class StudyError(LmoeError):
    """A study cannot be done as asked, or what it has kept cannot be used."""


class HubError(LmoeError):
    """The hub cannot be asked, or refuses."""


class BlendError(LmoeError):
    """Experts cannot be blended as asked: an unknown name, a weight that is no number, a model that is taken."""


def with_keys_renamed(text: str, names: Mapping[str, str]) -> str:
    """A message in the words of `keys_renamed`."""
    for key, name in names.items():
        pattern = rf"(?<![\w.]){re.escape(key)}" + (r"(?!\w)" if key[-1].isalnum() else "")
        text = re.sub(pattern, lambda _, to=name: to, text)
    return text


@contextmanager
def keys_renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors inside the block name what the caller was given, in place of keys of a config that it never wrote.

    Args:
        names: by key, as the message is to have it: {"backbone.model_name": "`base_model`"}.

    Raises:
        LmoeError: the same error, in other words.
    """
    try:
        yield
    except LmoeError as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        problems = [with_keys_renamed(problem, names) for problem in problems]
        raise (type(error)(problems) if isinstance(error, ConfigError) else type(error)(problems[0])) from None
