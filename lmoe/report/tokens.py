"""Tokens as a reader sees them: what is invisible gets a mark, and tokens of one kind stand together."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmoe.data.show import ShownSample

LEARNT_MARKS = ("⟦", "⟧")
"""Around what is learnt, for who sees no colour."""
MARKS = {"\n": "↵\n", "\t": "⇥\t"}
"""Shown with a mark before it."""
OWN = frozenset({*LEARNT_MARKS, *(mark[0] for mark in MARKS.values())})
"""What would be taken for a mark where the text itself holds it."""
NO_TEXT = "[no text]"
"""A token that stands for no character."""
JOINERS = "\u200c\u200d"
"""Invisible, but emoji and whole scripts are written with them."""
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode that no reader sees, or that turn the direction of what follows."""


def visible(text: str) -> str:
    """Text with marks for what cannot be seen or would act on a terminal or page, e.g. [U+202E]; line breaks stay."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    hidden = unicodedata.category(character) in HIDDEN and character not in JOINERS
    if hidden or character in OWN:
        return f"[U+{ord(character):04X}]"
    return character


@dataclass(slots=True, frozen=True, kw_only=True)
class TokenText:
    """One token, or those that make one character together.

    Args:
        text: visible.
        ids: numbers in the vocabulary.
        special: whether it is a special token.
        ends_turn: whether a turn of the assistant ends with it.
    """

    text: str
    ids: tuple[int, ...]
    special: bool
    ends_turn: bool

    @property
    def label(self) -> str:
        """What it is, in words."""
        words = [f"{'token' if len(self.ids) == 1 else 'tokens'} {', '.join(map(str, self.ids))}"]
        if self.special:
            words.append("special")
        if self.ends_turn:
            words.append("ends a turn")
        return ", ".join(words)


@dataclass(slots=True, frozen=True, kw_only=True)
class TokenRun:
    """Neighbours that are all learnt, all seen but not learnt, or all cut."""

    learnt: bool
    cut: bool
    tokens: tuple[TokenText, ...]

    @property
    def text(self) -> str:
        """Return the texts of all its tokens, joined."""
        return "".join(token.text for token in self.tokens)


def token_runs(sample: "ShownSample") -> list[TokenRun]:
    """The tokens of a sample, a character of several tokens once, which is learnt where one of them is."""
    runs = []
    for (learnt, cut), neighbours in groupby(_token_texts(sample), key=itemgetter(0)):
        runs.append(TokenRun(learnt=learnt, cut=cut, tokens=tuple(text for _, text in neighbours)))
    return runs


def _token_texts(sample: "ShownSample") -> Iterator[tuple[tuple[bool, bool], TokenText]]:
    """((learnt, cut), text) of each token, or of those that make one character together."""
    groups: list[list[int]] = []
    for i, token in enumerate(sample.tokens):
        continues = not token.text and not token.special
        if continues and groups and not sample.tokens[groups[-1][0]].special:
            groups[-1].append(i)
        else:
            groups.append([i])
    ends = set(sample.turn_ends)
    for group in groups:
        tokens = [sample.tokens[i] for i in group]
        text = TokenText(
            text=visible(tokens[0].text) or NO_TEXT,
            ids=tuple(token.id for token in tokens),
            special=tokens[0].special,
            ends_turn=not ends.isdisjoint(group),
        )
        yield (any(token.learnt for token in tokens), tokens[0].cut), text
