"""Where what the user, the system and tools say stands in a rendered conversation: nobody learns to say it.

The conversation is rendered once more with marks around these contents, or, for templates that look at how a content
begins, in the middle of each; without the marks that must be the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lmoe.data.chats.spans import Render, Span, sentinels
from lmoe.data.chats.template_input import content_of
from lmoe.data.rows.row import Message
from lmoe.errors import DataError


@dataclass(slots=True, frozen=True)
class OtherContents:
    """What others than the assistant say.

    Args:
        places: where it stands, in order.
        unplaced: contents of which that is not known.
    """

    places: Sequence[Span] = ()
    unplaced: Sequence[str] = ()

    def last_end(self, before: int) -> int:
        """Where the last of them ends that begins before a character; 0: there is none."""
        return max((end for start, end in self.places if start < before), default=0)

    def overlap(self, span: Span) -> bool:
        """Whether one of them stands in a span."""
        return any(start < span[1] and span[0] < end for start, end in self.places)

    def within(self, text: str) -> bool:
        """Whether one whose place is not known may stand in a text."""
        return any(content in text for content in self.unplaced)


def other_contents(text: str, messages: Sequence[Message], render: Render) -> OtherContents:
    """Places of what others than the assistant say.

    Args:
        text: the rendering of `messages`.
        render: the template.
    """
    contents = [content_of(message).strip() for message in messages if message["role"] != "assistant"]
    contents = [content for content in contents if content]
    if not contents or not (marks := sentinels(text, 1)):
        return OtherContents(unplaced=contents)
    opening, closing = marks[0]

    def probe(around: bool) -> str:
        marked = []
        for message in messages:
            said = content_of(message).strip()
            if message["role"] != "assistant" and said:
                half = len(said) // 2
                written = f"{opening}{said}{closing}" if around else f"{said[:half]}{opening}{said[half:]}"
                message = {**message, "content": message["content"].replace(said, written, 1)}
            marked.append(message)
        try:
            return render(marked, False)
        except DataError:
            return ""

    if (places := _between(text, probe(True), opening, closing)) is not None:
        return OtherContents(places)
    return _around(text, probe(False), opening, contents)


def _between(text: str, probe: str, opening: str, closing: str) -> list[Span] | None:
    """Places between pairs of marks; None: the probe is another text, or a mark has no other."""
    head, *pieces = probe.split(opening)
    rebuilt, places = head, []
    for piece in pieces:
        if piece.count(closing) != 1:
            return None
        inside, _, behind = piece.partition(closing)
        places.append((len(rebuilt), len(rebuilt) + len(inside)))
        rebuilt += inside + behind
    return places if rebuilt == text else None


def _around(text: str, probe: str, mark: str, contents: Sequence[str]) -> OtherContents:
    """Places of contents that have a mark in their middle; all are unplaced where the probe is another text."""
    if probe.replace(mark, "") != text:
        return OtherContents(unplaced=contents)
    places, placed, middle = [], set(), 0
    for piece in probe.split(mark)[:-1]:
        middle += len(piece)
        for content in contents:
            start = middle - len(content) // 2
            if start >= 0 and text.startswith(content, start):
                places.append((start, start + len(content)))
                placed.add(content)
                break
    return OtherContents(places, [content for content in contents if content not in placed])
