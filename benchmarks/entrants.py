"""The contestants of a group that can take part, and why the others cannot."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from benchmarks.contestants import Contestant
from benchmarks.results import Skip
from benchmarks.timing import Laps

RunT = TypeVar("RunT", bound=Callable[[], Laps])


def chosen(group: Sequence[Contestant], only: Sequence[str] | None) -> list[Contestant]:
    """The contestants whose name starts with one of `only`, and their references."""
    if not only:
        return list(group)
    named = {contestant.name for contestant in group if contestant.name.startswith(tuple(only))}
    wanted = named | {contestant.reference for contestant in group if contestant.name in named}
    return [contestant for contestant in group if contestant.name in wanted]


def ready(
    group: Sequence[Contestant], build: Callable[[Contestant], RunT]
) -> tuple[dict[Contestant, RunT], list[Skip]]:
    """Build each contestant and run it once.

    Args:
        group: who is to take part.
        build: makes the run of one of them.

    Returns:
        The runs, and a note for each foreign library that is missing or fails.
    """
    runs: dict[Contestant, RunT] = {}
    skipped: list[Skip] = []
    for contestant in group:
        try:
            run = build(contestant)
            run()
        except ImportError as error:
            if not contestant.foreign:
                raise
            skipped.append(Skip(name=contestant.name, why=f"not installed: {error}"))
        except Exception as error:  # whatever another project's code raises, the others are still to be timed
            if not contestant.foreign:
                raise
            skipped.append(Skip(name=contestant.name, why=f"failed: {_first_line(error)}"))
        else:
            runs[contestant] = run
    return runs, skipped


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
