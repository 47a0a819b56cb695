"""Where the assistant's turns are in a rendered conversation, for chat templates without {% generation %}.

The conversation is rendered once more with a sentinel in the place of each of these turns' contents. What stands
between the sentinels is found again in the first rendering, and what stands there in the place of a sentinel is the
turn, whatever the same words say elsewhere. Turns for which this does not rebuild the whole text are looked for one by
one, each with a rendering of its own: where the two part and where they meet again is the place of the turn.
A span is (start, end) in characters of the one rendering that is tokenised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from lmoe.data.chats.template_input import called_names, content_of, reasoning_of
from lmoe.data.rows.row import Message
from lmoe.errors import DataError

Span = tuple[int, int]
Render = Callable[[Sequence[Message], bool], str]
"""Text of messages, with or without the prompt that an answer is to follow; raises DataError where it refuses them."""

THOUGHTS = ("reasoning_content", "thinking")
"""Fields of a message, as templates name them."""
PRIVATE_USE = range(0xE000, 0xF900)
FAILURES = 4
"""So many turns are taken out of the common rendering, one after the other, before all are looked for one by one."""


@dataclass(slots=True, frozen=True)
class TurnFinder:
    """Finds turns in one rendering.

    Args:
        text: the rendering of `messages`.
        messages: as the template takes them.
        render: the template.
        tokens: texts of the tokenizer's added tokens, one of which may end a turn.
        others: where what others say stands; asked for only where a turn is more than its content.
    """

    text: str
    messages: Sequence[Message]
    render: Render
    tokens: Sequence[str] = ()
    others: Callable[[], Sequence[Span]] = tuple

    def places(self, wanted: Sequence[int]) -> dict[int, Span]:
        """The place of each turn by its index, without the token that ends it; those that cannot be found are left out.

        Of a plain turn its content; of one that reasons or calls tools all that the template writes of it.

        Args:
            wanted: indices of assistant turns that say something, in order.
        """
        together = list(wanted)
        found: dict[int, Span] = {}
        for _ in range(FAILURES):
            if len(together) < 2:
                break
            found, failed = self._together(together)
            if not failed:
                break
            found, together = {}, [index for index in together if index not in failed]
        for index in wanted:
            if index in found:
                continue
            place = self._alone(index)
            if place is None or self._reaches_others(index, place):
                by_prefixes = self._by_prefixes(index, self._window(index, found))
                place = self._own_part(index, by_prefixes or place)
            if place is not None:
                found[index] = place
        return dict(sorted(found.items()))

    def _reaches_others(self, index: int, place: Span) -> bool:
        """Whether a place that is more than the turn's content holds what others say: some templates write what a tool
        answers into the turn that calls it."""
        return _is_more_than_content(self.messages[index]) and any(
            start < place[1] and place[0] < end for start, end in self.others()
        )

    def _own_part(self, index: int, place: Span | None) -> Span | None:
        """The part of a place, between what others say, which is the turn."""
        if place is None or not self._reaches_others(index, place):
            return place
        parts = (self._turn_in(index, *part) for part in cut_out(place, self.others()))
        return next((part for part in parts if part is not None), None)

    def _window(self, index: int, found: Mapping[int, Span]) -> Span:
        """Where a turn can be: between the turns beside it that are found."""
        before = [end for other, (_, end) in found.items() if other < index]
        behind = [start for other, (start, _) in found.items() if other > index]
        return max(before, default=0), min(behind, default=len(self.text))

    def _together(self, wanted: list[int]) -> tuple[dict[int, Span], set[int]]:
        """The places of all these turns by one rendering, or else those turns that stand in its way."""
        marks = dict(zip(wanted, sentinels(self.text, len(wanted)), strict=False))
        try:
            probe = self.render([_plain(m, marks.get(i)) for i, m in enumerate(self.messages)], False)
        except DataError:
            return {}, {i for i in wanted if called_names(self.messages[i])} or set(wanted)
        if failed := {i for i in wanted if i not in marks or probe.count(marks[i]) != 1}:
            return {}, failed
        pieces = []
        for index in wanted:
            before, mark, after = probe.partition(marks[index])
            if not mark:
                return {}, set(wanted)  # the template writes the turns in another order
            pieces.append(before)
            probe = after
        slots, failed_at = _slots(self.text, [*pieces, probe])
        if failed_at is not None:
            return {}, {wanted[failed_at]}
        found = {}
        for index, slot in zip(wanted, slots, strict=True):
            place = self._turn_in(index, *slot)
            if place is None or self._reaches_others(index, place):
                return {}, {index}
            found[index] = place
        return found, set()

    def _alone(self, index: int) -> Span | None:
        """The place of one turn, by a rendering for it alone."""
        [sentinel] = sentinels(self.text, 1)
        try:
            probe = self.render(
                [_plain(m, sentinel if i == index else None) for i, m in enumerate(self.messages)], False
            )
        except DataError:
            return None
        before, found, after = probe.partition(sentinel)
        if not found or sentinel in after or not self.text.endswith(after):
            return None
        return self._turn_in(index, common_prefix(self.text, before), len(self.text) - len(after))

    def _by_prefixes(self, index: int, window: Span) -> Span | None:
        """The place of a turn that a plain one cannot stand in for: between the conversation up to it, with the prompt
        for it, and the conversation up to its end.

        Args:
            window: where to look for it if the rest of the conversation changes what comes before it.
        """
        if not _is_more_than_content(self.messages[index]):
            return None
        for message in _shorter(self.messages[index]):
            place = self._between_prefixes(index, message, window) or self._in_prefix(index, message, window)
            if place is not None:
                return place
        return None

    def _between_prefixes(self, index: int, message: Message, window: Span) -> Span | None:
        try:
            before = self.render(self.messages[:index], False)
            asking = self.render(self.messages[:index], True)
            whole = self.render([*self.messages[:index], message], False)
        except DataError:
            return None
        if not whole.startswith(before):
            return None
        start = common_prefix(whole, asking)
        turn = whole[start:].rstrip()
        if not turn or start < len(before):
            return None
        start = self._found_again(whole[:start], turn, window)
        if start is None:
            return None
        ending = max((token for token in self.tokens if turn.endswith(token)), key=len, default="")
        return self._turn_in(index, start, start + len(turn) - len(ending))

    def _in_prefix(self, index: int, message: Message, window: Span) -> Span | None:
        """The place that a plain turn shows in the conversation up to it, for templates that write what comes before
        otherwise where it is the last."""
        [sentinel] = sentinels(self.text, 1)
        try:
            whole = self.render([*self.messages[:index], message], False)
            probe = self.render([*self.messages[:index], _plain(message, sentinel)], False)
        except DataError:
            return None
        before, found, after = probe.partition(sentinel)
        start = common_prefix(whole, before)
        turn = whole[start : len(whole) - len(after)]
        if not found or sentinel in after or not whole.endswith(after) or not turn.strip():
            return None
        place = self._found_again(whole[:start], turn, window)
        return None if place is None else self._turn_in(index, place, place + len(turn))

    def _found_again(self, before: str, turn: str, window: Span) -> int | None:
        """Where a turn begins that stands behind `before` in another rendering; None: nowhere, or in more than one
        place."""
        if self.text.startswith(before + turn):
            return len(before)
        start = self.text.find(turn, *window)  # such as one that writes the tools before the last question
        return start if start >= 0 and self.text.find(turn, start + 1, window[1]) < 0 else None

    def _turn_in(self, index: int, start: int, end: int) -> Span | None:
        """The place of a turn that is looked for in text[start:end]; None: what it says is not there."""
        message = self.messages[index]
        if start >= end:
            return None
        if not _is_more_than_content(message):
            return _reach_back(self.text, start, end, content_of(message))
        inside = self.text[start:end]
        if names := called_names(message):
            return (start, end) if all(name in inside for name in names) else None
        answer = content_of(message).rpartition("</think>")[2]
        return (start, end) if squeezed(answer) in squeezed(inside) else None


def cut_out(span: Span, places: Sequence[Span]) -> list[Span]:
    """What is left of a span without places that are in order."""
    left, (position, end) = [], span
    for start, stop in places:
        left.append((position, min(start, end)))
        position = max(position, stop)
    return [(start, stop) for start, stop in [*left, (position, end)] if start < stop]


def squeezed(text: str) -> str:
    """Text without white space, which templates strip and insert."""
    return "".join(text.split())


def _is_more_than_content(message: Message) -> bool:
    return bool(called_names(message) or reasoning_of(message).strip())


def _shorter(message: Message) -> list[Message]:
    """The turn, and what templates leave of it later on: without its thoughts, and of calls nothing but these."""
    silent = {key: value for key, value in message.items() if key not in THOUGHTS}
    calls_alone = [{**silent, "content": content} for content in ("", None)]
    forms = [message, silent, *(calls_alone if called_names(message) else [])]
    return [form for place, form in enumerate(forms) if form not in forms[:place]]


def _plain(message: Message, content: str | None) -> Message:
    """A turn that says nothing but `content`; None: the turn as it is."""
    if content is None:
        return message
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", *THOUGHTS)}
    return {**rest, "content": content}


def sentinels(text: str, count: int) -> list[str]:
    """Pairs of private-use characters that `text` does not have, at most `count` of them, no two alike."""
    used = set(text)
    first, *others = islice((chr(code) for code in PRIVATE_USE if chr(code) not in used), count + 1)
    return [first + other for other in others]


def _slots(text: str, pieces: Sequence[str]) -> tuple[list[Span], int | None]:
    """What stands between pieces that follow one another in a text, from its beginning to its end.

    Returns:
        The places between the pieces, and the first slot beside which a piece cannot be found, or where the pieces can
        be found in more than one way; None: they are found in one way only.
    """
    first, last = pieces[0], pieces[-1]
    if not text.startswith(first):
        return [], 0
    count = len(pieces) - 1
    if not text.endswith(last):
        return [], count - 1
    early, position = [], len(first)
    for number, piece in enumerate(pieces[1:-1]):
        end = text.find(piece, position)
        if end < 0:
            return [], number + 1
        early.append((position, end))
        position = end + len(piece)
    early.append((position, len(text) - len(last)))
    if position > len(text) - len(last):
        return [], count - 1
    late, end = [], len(text) - len(last)
    for piece in reversed(pieces[1:-1]):
        place = text.rfind(piece, 0, end)
        late.append((place + len(piece), end))
        end = place
    late = [(len(first), end), *reversed(late)]
    return early, next((i for i, (one, other) in enumerate(zip(early, late, strict=True)) if one != other), None)


def common_prefix(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
