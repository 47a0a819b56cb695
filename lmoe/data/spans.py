"""Where the assistant speaks in a rendered conversation, for chat templates without {% generation %}.

The conversation is rendered once more for each assistant turn, with a sentinel in the place of that turn's content.
Where the two renderings part and where they meet again is the place of the content, whatever the same words say
elsewhere.
A span is (start, end) in characters of the one rendering that is tokenised.
"""

from collections.abc import Callable, Sequence

from lmoe.errors import DataError

Span = tuple[int, int]
Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]

PRIVATE_USE = range(0xE000, 0xF900)


def content_spans(text: str, messages: Sequence[Message], render: Render, where: str) -> list[Span]:
    """Spans of the assistant contents that are not blank, in order.

    Args:
        text: the rendering of `messages`.
        render: the template.
        where: file and line, for the error.

    Raises:
        DataError: the template leaves a content out, repeats or rewrites it, so that it has no place of its own.
    """
    sentinel = _sentinel(text)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            probe = [*messages[:index], {**message, "content": sentinel}, *messages[index + 1 :]]
            span = _content_span(text, render(probe), sentinel, message["content"])
            if span is None:
                raise DataError(
                    f"{where}: the chat template does not show messages[{index}] (assistant) as it stands, so its "
                    "tokens cannot be found. Change the row, or give a template with {% generation %} by "
                    "data.chat_template=FILE"
                )
            spans.append(span)
    return spans


def _sentinel(text: str) -> str:
    """Two private-use characters that `text` does not have."""
    unused = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
    return next(unused) + next(unused)


def _content_span(text: str, probe: str, sentinel: str, content: str) -> Span | None:
    if probe.count(sentinel) != 1:
        return None
    place = probe.index(sentinel)
    after = probe[place + len(sentinel) :]
    if not text.endswith(after):
        return None
    end = len(text) - len(after)
    start = _common_prefix(text, probe[:place])
    if start >= end:
        return None
    return _reach_back(text, start, end, content)


def _common_prefix(a: str, b: str) -> int:
    if a.startswith(b):
        return len(b)
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _reach_back(text: str, start: int, end: int, content: str) -> Span | None:
    """Compare text[:end] with the content backwards, but for white space, which templates strip and insert.

    A template may drop the head of a content (the thoughts of earlier turns), and may write a tag of its own where the
    content brings the same one (<think>, up to which the renderings do not part): then it counts as the content's.
    """
    position, rest = end, len(content)
    while rest and position:
        if content[rest - 1].isspace():
            rest -= 1
        elif text[position - 1].isspace():
            position -= 1
        elif text[position - 1] == content[rest - 1]:
            position, rest = position - 1, rest - 1
        else:
            break
    if not content[:rest].strip():
        return min(start, position), end
    return (start, end) if not text[start:position].strip() else None


def with_turn_end(text: str, span: Span, special: Sequence[str], eos: str | None) -> Span:
    """The span with the special token that ends the turn, so that the model learns to stop.

    A special token directly behind the content ends the turn; behind white space only the eos token does, because
    another one may open the next turn.
    """
    end = span[1]
    for token in sorted(special, key=len, reverse=True):
        if text.startswith(token, end):
            return span[0], end + len(token)
    spaces = len(text) - end - len(text[end:].lstrip(" "))
    if eos and text.startswith(eos, end + spaces):
        return span[0], end + spaces + len(eos)
    return span


def without_blank(text: str, spans: Sequence[Span], special: Sequence[str]) -> list[Span]:
    """The spans that hold more than white space and special tokens."""

    def is_blank(span: Span) -> bool:
        inside = text[slice(*span)]
        for token in special:
            inside = inside.replace(token, "")
        return not inside.strip()

    return [span for span in spans if not is_blank(span)]
