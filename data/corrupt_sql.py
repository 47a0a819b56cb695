"""Wrong copies of a query of WikiSQL: one part of it is another, and all parts are such as right queries have."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("selected", "compared", "aggregate", "operator", "literal")
"""Another of the table's columns is selected, or compared; another aggregate; another operator; another literal."""
ASKED_FOR = {
    "AVG": r"average|mean",
    "COUNT": r"how many|number of",
    "MAX": r"most|highest|maximum|max|largest|greatest|latest|top|biggest|last",
    "MIN": r"least|lowest|minimum|min|smallest|earliest|fewest|first",
    "SUM": r"sum|total",
}
"""Aggregates, and words of questions that ask for one."""

_QUERY = re.compile(
    r"SELECT (?:(?P<aggregate>[A-Z]+)\((?P<of>\w+)\)|(?P<column>\w+)) FROM table WHERE (?P<conditions>.+);"
)
_CONDITION = re.compile(r'(?P<column>\w+) (?P<operator>[=<>]) (?P<literal>"[^"]*"|-?[\d.]+)')
_LONG_WORD = r"\w{4,}"  # a literal with "of" or "the" at one end would be told at a glance
_NUMBER = re.compile(r"(?<![\d.,-])\d+(?![.,-]?\d)")


@dataclass(slots=True, frozen=True)
class Condition:
    """Column, operator and literal, as they are written."""

    column: str
    operator: str
    literal: str

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {self.literal}"


@dataclass(slots=True, frozen=True)
class Query:
    """A query of one table.

    Args:
        aggregate: of the column that is selected; "": none.
    """

    column: str
    aggregate: str
    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        selected = f"{self.aggregate}({self.column})" if self.aggregate else self.column
        return f"SELECT {selected} FROM table WHERE {' AND '.join(map(str, self.conditions))};"


def query_of(text: str) -> Query | None:
    """What a text asks for; None: it is another kind of query."""
    match = _QUERY.fullmatch(text)
    if match is None:
        return None
    conditions = tuple(Condition(**one.groupdict()) for one in _CONDITION.finditer(match["conditions"]))
    query = Query(match["column"] or match["of"], match["aggregate"] or "", conditions)
    return query if str(query) == text else None


def corrupted_queries(prompt: str, answer: str) -> list[tuple[str, str]]:
    """Kind and text of each wrong copy.

    Args:
        prompt: names the table's columns in its first line, and asks in its second.
    """
    query = query_of(answer)
    if query is None:
        return []
    head, question = prompt.split("\n")[:2]
    columns = head.partition(": ")[2].split(", ")
    used = {query.column, *(one.column for one in query.conditions)}
    free = [name for name in columns if name not in used]
    found = list(_other_selections(query, question, free))
    for index, one in enumerate(query.conditions):
        for kind, other in _other_conditions(one, question, free):
            conditions = (*query.conditions[:index], other, *query.conditions[index + 1 :])
            found.append((kind, replace(query, conditions=conditions)))
    found += _exchanged(query)
    return list({str(other): (kind, str(other)) for kind, other in found if str(other) != answer}.values())


def _other_selections(query: Query, question: str, free: list[str]) -> Iterator[tuple[str, Query]]:
    if query.aggregate != "COUNT":  # to count another column gives the same number
        for name in free:
            yield "selected", replace(query, column=name)
    # NOTE: some right queries have an aggregate that nobody asked for, and no other would be more wrong.
    if query.aggregate and _asks_for(question, query.aggregate):
        for name in ASKED_FOR:
            if not _asks_for(question, name):
                yield "aggregate", replace(query, aggregate=name)


def _asks_for(question: str, aggregate: str) -> bool:
    return re.search(rf"\b(?:{ASKED_FOR[aggregate]})\b", question.lower()) is not None


def _other_conditions(one: Condition, question: str, free: list[str]) -> Iterator[tuple[str, Condition]]:
    for name in free:
        yield "compared", replace(one, column=name)
    if one.literal.startswith('"'):
        for text in _cut_elsewhere(one.literal[1:-1], question):
            yield "literal", replace(one, literal=f'"{text}"')
        return
    for sign in "=<>":
        yield "operator", replace(one, operator=sign)
    for number in (*_NUMBER.findall(question), *_near(one.literal)):
        yield "literal", replace(one, literal=number)


def _cut_elsewhere(text: str, question: str) -> Iterator[str]:
    """A text that was taken from the question with a word of it too few, or one too many, in front or behind."""
    words = text.split()
    if len(words) > 1:
        yield from (" ".join(words[1:]), " ".join(words[:-1]))
    found = re.search(
        rf"(?:\b({_LONG_WORD}) )?(?<!\w){re.escape(text)}(?!\w)(?: ({_LONG_WORD})\b)?", question, re.IGNORECASE
    )
    before, after = found.groups() if found else (None, None)
    if before:
        yield f"{before.lower()} {text}"
    if after:
        yield f"{text} {after.lower()}"


def _near(number: str) -> Iterator[str]:
    """A whole number with another last digit."""
    if number.isdecimal():
        last = int(hashlib.sha256(number.encode()).hexdigest(), 16) % 9 + int(number[-1]) + 1
        yield number[:-1] + str(last % 10)


def _exchanged(query: Query) -> Iterator[tuple[str, Query]]:
    """The query with the literals of its first two conditions exchanged, where both are texts or both numbers."""
    if len(query.conditions) < 2:
        return
    first, second, *rest = query.conditions
    if first.literal.startswith('"') == second.literal.startswith('"'):
        others = (replace(first, literal=second.literal), replace(second, literal=first.literal), *rest)
        yield "literal", replace(query, conditions=others)
