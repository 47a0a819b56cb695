"""Errors that users see: one message, no traceback. An assert is for our own bugs.

A message of the library names no flag. An argument of the function that was called stands in backticks: `max_length`,
or `max_length=900` with what it was given; so does a call that is advised: `lmoe.load(…)`. The command line says its
own flag or key there (lmoe/cli/errors.py). Keys of a config stand without backticks: data.max_length.
"""

from collections.abc import Sequence


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


class BlendError(LmoeError):
    """Experts cannot be blended as asked: an unknown name, a weight that is no number, a model that is taken."""
