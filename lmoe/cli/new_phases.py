"""`+phase.phases.<name>.<key>=…`: a phase more, from the command line.

Hydra can set a key of a phase only where the phase is there, so an empty one comes before it, as a choice of a group.
"""

from collections.abc import Iterable

from hydra.core.config_store import ConfigStore

PHASES = "phase.phases."
GROUP, EMPTY = "phase/new", "phase"


def store_empty_phase() -> None:
    """Make the choice known to Hydra."""
    ConfigStore.instance().store(group=GROUP, name=EMPTY, node={})


def with_empty_phases(arguments: Iterable[str]) -> list[str]:
    """The arguments, and such as make the phases that those with a + add; a phase that is there stays as it is."""
    given = [f"+{text}" if text.startswith(f"+{PHASES}") else text for text in arguments]  # ++: of a key that is there
    keys = [text.removeprefix(f"++{PHASES}").split("=")[0] for text in given if text.startswith(f"++{PHASES}")]
    names = dict.fromkeys(key.split(".")[0] for key in keys)
    return [*given, *(f"+{GROUP}@{PHASES}{name}={EMPTY}" for name in names)]


def typed(overrides: Iterable[str]) -> list[str]:
    """Overrides without what `with_empty_phases` has put to them."""
    return [override for override in overrides if not override.startswith(f"+{GROUP}@")]
