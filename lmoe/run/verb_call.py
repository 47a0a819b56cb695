"""What a user could call next, as a verb with its settings; the command line says it in its own words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(slots=True, frozen=True, kw_only=True)
class VerbCall:
    """A verb of lmoe, and what it would be called with.

    Args:
        verb: such as generate.
        settings: values by the name that the library has for them, in the order in which they are said.
    """

    verb: str
    settings: Mapping[str, object]

    def __str__(self) -> str:
        return " ".join([self.verb, *(f"{name}={value}" for name, value in self.settings.items())])


Wording = Callable[[VerbCall], str]
"""How a call is said to the user."""


def resuming(verb: str, run_dir: object) -> VerbCall:
    """The call with which a run goes on.

    Args:
        verb: that has started it, train or pretrain.
        run_dir: as the user would type it.
    """
    return VerbCall(verb=verb, settings={"resume": run_dir})
