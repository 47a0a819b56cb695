"""What became of the records of a source: kept, dropped, refused, and what of them nothing was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from lmoe.data.rows.contract import UNKNOWN
from lmoe.errors import DataError

NAMED = 5
"""Bad rows that a message names."""


@dataclass(slots=True, kw_only=True)
class Account:
    """Counts of rows.

    Args:
        read: records.
        bad: records that cannot be used, such as one that is malformed or that the chat template refuses.
        first_bad: why, of the first ones, with file and line.
        dropped: rows left out because nothing of them can be learnt, by reason.
        truncated: rows among those kept that were cut at the end.
        formats: rows of each format.
        ignored: rows that have a field of which nothing is made, by field.
        largest_token: the largest id of a token; -1 without any.
        turns: the assistant's turns that are learnt.
        endless: those of them whose end is not learnt.
        shortened: the assistant's turns of which the chat template leaves something out.
        unprefixed: rows without a message of the user, before which data.prompt_prefix would stand; 0 without it.
    """

    read: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    largest_token: int = -1
    turns: int = 0
    endless: int = 0
    shortened: int = 0
    unprefixed: int = 0

    def refuse(self, problem: str) -> None:
        """Count a bad row."""
        self.bad += 1
        if len(self.first_bad) < NAMED:
            self.first_bad.append(problem)

    def add(self, other: Account) -> None:
        """Count the rows that come behind these."""
        self.first_bad = [*self.first_bad, *other.first_bad][:NAMED]
        for name in ("read", "bad", "truncated", "turns", "endless", "shortened", "unprefixed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_token = max(self.largest_token, other.largest_token)
        for name in ("dropped", "formats", "ignored"):
            getattr(self, name).update(getattr(other, name))

    @staticmethod
    def sum(accounts: Iterable[Account]) -> Account:
        """All counts together, in order."""
        total = Account()
        for account in accounts:
            total.add(account)
        return total

    def check(self, *, advise: bool = True) -> None:
        """Refuse bad rows.

        Args:
            advise: say which keys of a config help; False: the user has none.

        Raises:
            DataError: there are some; names the first ones.
        """
        if not self.bad:
            return
        lines = _by_reason(self.first_bad)
        if self.bad > len(self.first_bad):
            lines.append(f"and {self.bad - len(self.first_bad):,} more")
        if advise and any(UNKNOWN in problem for problem in self.first_bad):
            lines.append("data.columns={prompt: question, response: answer} names other keys")
        if self.bad == self.read == 1:
            raise DataError("; ".join(lines))
        cure = "; mend them" if advise else ""
        if advise and self.bad < self.read:
            cure += ", or leave them out with data.on_bad_row=drop"
        raise DataError(f"{self.bad:,} of {self.read:,} rows cannot be used{cure}:\n  " + "\n  ".join(lines))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in an order that does not depend on that of the rows."""
        return {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }

    @staticmethod
    def of_json(stored: dict[str, Any]) -> Account:
        """What `to_json` wrote.

        Raises:
            TypeError, ValueError: something else.
        """
        counters: dict[str, Any] = {name: Counter(stored[name]) for name in ("dropped", "formats", "ignored")}
        return Account(**(stored | counters))


def _by_reason(problems: Iterable[str]) -> list[str]:
    """Problems as lines, those of one reason in one."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        where, _, reason = problem.partition(": ")
        places.setdefault(reason, []).append(where)
    return [f"{', '.join(where)}: {reason}" for reason, where in places.items()]
