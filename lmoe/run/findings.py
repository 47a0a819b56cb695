"""What was found out about an installation and its machine, one answer at a time."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

GB = 1e9


class State(StrEnum):
    """How a finding is to be taken."""

    fine = "fine"
    note = "note"
    unknown = "unknown"
    broken = "broken"


@dataclass(slots=True, frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Args:
        section: under which it stands.
        name: of what was looked at.
        value: what was found, or why nothing could be.
        state: broken: lmoe does not work without it.
        advice: what to do, or what it means; "": nothing.
    """

    section: str
    name: str
    value: str
    state: State = State.fine
    advice: str = ""


Probe = Callable[[], Iterator[Finding]]


def findings_of(section: str, name: str, probe: Probe, cure: str = "") -> Iterator[Finding]:
    """The findings of a probe, and one that says why where it fails.

    Args:
        section: of that one.
        name: of that one.
        probe: makes findings.
        cure: what to do where it fails; with one, lmoe does not work without it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from probe()
    except Exception as error:  # of many libraries, and of systems that nobody tried
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        value = f"fails: {reason}" if cure else f"cannot be found out: {reason}"
        state = State.broken if cure else State.unknown
        yield Finding(section=section, name=name, value=value, state=state, advice=cure)
