"""From the place of an assistant's turn to the characters of it that are learnt: where they begin and end, and whether
they say all that the row does."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmoe.data.chats.spans import Span, common_prefix, squeezed
from lmoe.data.chats.template_input import called_names, content_of, reasoning_of
from lmoe.data.rows.row import Message

THOUGHTS = re.compile(r"</?think(?:ing)?>")


@dataclass(slots=True, frozen=True)
class AnswerPrompt:
    """What a template writes where an answer is to follow.

    Args:
        text: the whole of it; "" where that is nothing, or stands elsewhere.
        head: that part of it with which the turn of a plain answer begins.
        goes_on: whether the template writes more than white space between this and a plain answer.
    """

    text: str = ""
    head: str = ""
    goes_on: bool = False

    @classmethod
    def of(cls, question: str, asking: str, answered: str, answer: str) -> "AnswerPrompt":
        """The prompt that renderings of one question show.

        Args:
            question: the rendering of the question alone.
            asking: with the prompt.
            answered: with a plain answer.
            answer: its content.
        """
        text = asking.removeprefix(question) if asking.startswith(question) else ""
        turn = answered.removeprefix(question) if answered.startswith(question) else ""
        common = common_prefix(text, turn)
        if not text[:common].strip():
            return cls(text, text)
        return cls(text, text[:common], bool(turn[common:].partition(answer)[0].strip()))


def with_turn_end(text: str, span: Span, tokens: Sequence[str], eos: str | None) -> Span:
    """The span with the token that ends the turn, so that the model learns to stop.

    A token directly behind the content ends the turn, with the eos token where that follows at once; behind white space
    only the eos token does, because another one may open the next turn.

    Args:
        tokens: texts of all added tokens, special or not.
    """
    end = span[1]
    if directly := [token for token in tokens if text.startswith(token, end)]:
        first = max(directly, key=len)
        end += len(first)
        more = eos if eos and first != eos and text.startswith(eos, end) else ""
        return span[0], end + len(more)
    spaces = len(text) - end - len(text[end:].lstrip())
    if eos and text.startswith(eos, end + spaces):
        return span[0], end + spaces + len(eos)
    return span


def earlier_span(text: str, span: Span, special: Sequence[str], eos: str | None) -> Span:
    """The span as runs were trained before a turn was learnt from the end of its prompt to any token that ends it: a
    content with the special token directly behind it, or the eos token behind blanks."""
    end = span[1]
    if directly := [token for token in special if text.startswith(token, end)]:
        return span[0], end + max(map(len, directly))
    blanks = len(text) - end - len(text[end:].lstrip(" "))
    return span[0], end + blanks + len(eos) if eos and text.startswith(eos, end + blanks) else end


def behind_prompt(text: str, span: Span, *, content_end: int, floor: int, prompt: AnswerPrompt) -> Span:
    """The span, begun where the prompt for an answer ends: what a template writes between that and the content (an
    empty think block) the model has to write itself.

    Where a template writes nothing but white space there, a turn begins with its content.

    Args:
        content_end: where the turn ends but for its end token.
        floor: end of the turn before.
    """
    start, end = span
    latest = start + (len(prompt.head) - 1 if prompt.goes_on else 0)  # a content may bring what the prompt has
    place = text.rfind(prompt.head, floor, latest) if prompt.head else -1
    if place < 0:
        return span
    begin = place + common_prefix(prompt.text, text[place : content_end if prompt.goes_on else start])
    between, ending = text[begin:start], text[content_end:end].strip()
    if begin >= content_end or (ending and ending in between):  # that would reach into another turn
        return span
    return (begin, end) if prompt.goes_on or between.strip() else span


def joined(spans: Sequence[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    found: list[Span] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def is_blank(text: str, tokens: Sequence[str]) -> bool:
    """Whether there is nothing but white space and tokens."""
    return not without_tokens(text, tokens).strip()


def without_tokens(text: str, tokens: Sequence[str]) -> str:
    """The text without the texts of these tokens."""
    for token in tokens:
        text = text.replace(token, "")
    return text


def ends_in_token(turn: str, content: str, tokens: Sequence[str]) -> bool:
    """Whether a learnt turn ends with a token that its content does not bring."""
    turn, content = turn.rstrip(), content.rstrip()
    return any(turn.endswith(token) for token in tokens) and not (content and turn.endswith(content))


def shows_all(turn: str, message: Message) -> bool:
    """Whether a rendered turn has all that its message says, white space and the tags of thoughts aside."""
    said = [reasoning_of(message), *THOUGHTS.split(content_of(message)), *called_names(message)]
    turn, position = squeezed(turn), 0
    for piece in map(squeezed, said):
        position = turn.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True
