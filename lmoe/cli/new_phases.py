"""`+phase.phases.<name>.<key>=…`: a phase more, from the command line.

Hydra can set a key of a phase only where the phase is there, so an empty one comes before it, as a choice of a group.
"""

from collections.abc import Iterable

from hydra.core.config_store import ConfigStore

PHASES, CALLBACKS = "phase.phases.", "callbacks."
GROUP, EMPTY = "phase/new", "phase"


def store_empty_phase() -> None:
    """Make the choice known to Hydra."""
    ConfigStore.instance().store(group=GROUP, name=EMPTY, node={})


def with_empty_phases(arguments: Iterable[str], *, resumes: bool) -> list[str]:
    """The arguments, and such as make the phases that those with a + add; a phase that is there stays as it is.

    Args:
        resumes: a run goes on, whose phases and callbacks Hydra does not know: what is set of them is added too.
    """
    added = (f"+{PHASES}", *((PHASES, CALLBACKS) if resumes else ()))
    given = [f"++{text.lstrip('+')}" if text.startswith(added) else text for text in arguments]
    keys = [text.removeprefix(f"++{PHASES}").split("=")[0] for text in given if text.startswith(f"++{PHASES}")]
    names = dict.fromkeys(key.split(".")[0] for key in keys)
    return [*given, *(f"+{GROUP}@{PHASES}{name}={EMPTY}" for name in names)]


def typed(overrides: Iterable[str]) -> list[str]:
    """Overrides without what `with_empty_phases` has put to them."""
    return [override for override in overrides if not override.startswith(f"+{GROUP}@")]
