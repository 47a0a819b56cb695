"""From the place of an assistant's turn to the characters of it that are learnt: where they begin and end, and whether
they say all that the row does."""

import re
from collections.abc import Sequence

from lmoe.data.row import Message
from lmoe.data.spans import Span, squeezed
from lmoe.data.template_input import called_names, content_of, reasoning_of

THOUGHTS = re.compile(r"</?think(?:ing)?>")


def with_turn_end(text: str, span: Span, tokens: Sequence[str], eos: str | None) -> Span:
    """The span with the token that ends the turn, so that the model learns to stop.

    A token directly behind the content ends the turn; behind white space only the eos token does, because another one
    may open the next turn.

    Args:
        tokens: texts of all added tokens, special or not.
    """
    end = span[1]
    if directly := [token for token in tokens if text.startswith(token, end)]:
        return span[0], end + max(map(len, directly))
    spaces = len(text) - end - len(text[end:].lstrip())
    if eos and text.startswith(eos, end + spaces):
        return span[0], end + spaces + len(eos)
    return span


def behind_prompt(text: str, span: Span, *, content_end: int, floor: int, prompt: str) -> Span:
    """The span, begun where the prompt for an answer ends: what a template writes between that and the content (an
    empty think block) the model has to write itself.

    Args:
        content_end: where the turn ends but for its end token.
        floor: end of the assistant's turn before.
        prompt: what the template writes where an answer is to follow; "" changes nothing.
    """
    start, end = span
    place = text.rfind(prompt, floor, start) if prompt else -1
    between = text[place + len(prompt) : start]
    ending = text[content_end:end].strip()
    if place < 0 or not between.strip() or (ending and ending in between):  # that would reach into another turn
        return span
    return place + len(prompt), end


def is_blank(text: str, tokens: Sequence[str]) -> bool:
    """Whether there is nothing but white space and tokens."""
    for token in tokens:
        text = text.replace(token, "")
    return not text.strip()


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
