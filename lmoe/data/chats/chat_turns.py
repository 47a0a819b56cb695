"""Which characters of a rendered conversation are learnt: the assistant's turns, and nothing that others say."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from lmoe.data.chats.other_turns import OtherContents, other_contents
from lmoe.data.chats.spans import Render, Span, TurnFinder, cut_out, squeezed
from lmoe.data.chats.template_input import called_names, content_of, reasoning_of, says_something
from lmoe.data.chats.turn_labels import (
    AnswerPrompt,
    behind_prompt,
    ends_in_token,
    is_blank,
    joined,
    shows_all,
    with_turn_end,
    without_tokens,
)
from lmoe.data.rows.row import Message
from lmoe.errors import DataError
from lmoe.vocabulary import TrainOn


class TokenTexts(NamedTuple):
    """Texts of a tokenizer's added tokens.

    Args:
        special: those that are special.
        every: all of them.
        eos: the eos token.
    """

    special: Sequence[str]
    every: Sequence[str]
    eos: str | None


@dataclass(slots=True, frozen=True, kw_only=True)
class Chat:
    """A row on its way through a template.

    Args:
        messages: as the template takes them.
        tools: functions that may be called.
        where: file and line.
        text: the rendering.
        marked: what {% generation %} marks in it; None: the template has no such marks.
        render: the template, with these tools.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str
    text: str
    marked: list[Span] | None
    render: Render

    @property
    def assistant(self) -> list[int]:
        """Indices of the assistant's turns."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def speaking(self) -> list[int]:
        """Indices of those of them that say something."""
        return [index for index in self.assistant if says_something(self.messages[index])]


class Turn(NamedTuple):
    """A turn of the assistant in a rendering; index None: it is not known which."""

    index: int | None
    span: Span


class ChatTurns:
    """Finds the assistant's turns in a rendered conversation.

    Args:
        chat: the conversation.
        tokens: that may end a turn.
        prompt: what the template writes where an answer is to follow; asked for only where it counts.
        train_on: the turns that are learnt.
    """

    def __init__(
        self, chat: Chat, tokens: TokenTexts, prompt: Callable[[], AnswerPrompt], train_on: TrainOn = TrainOn.assistant
    ) -> None:
        self.chat, self._tokens, self._prompt, self._train_on = chat, tokens, prompt, train_on

    @cached_property
    def others(self) -> OtherContents:
        """What others than the assistant say."""
        return other_contents(self.chat.text, self.chat.messages, self.chat.render)

    def turns(self, asked: Collection[int]) -> list[Turn]:
        """The assistant's turns with their ends, in order: those that are asked for, and muted ones where all text is
        learnt, which has to leave them out."""
        chat = self.chat
        if chat.marked is None:
            found = self._unmarked(asked)
            return found if self._train_on is TrainOn.all else [turn for turn in found if turn.index in asked]
        marks = chat.marked if len(chat.marked) == len(chat.assistant) else joined(chat.marked)
        if len(marks) == len(chat.assistant):
            turns = [Turn(index, span) for index, span in zip(chat.assistant, marks, strict=True)]
        elif not set(chat.assistant) - set(asked):
            turns = [Turn(None, span) for span in marks]
        else:  # the marks must be told apart
            places = self.places(chat.speaking, needed=set(chat.speaking) - set(asked))
            turns = [turn for span in marks for turn in _owned(span, places)]
        return [turn for turn in turns if not self._is_blank(turn)]

    def places(self, wanted: Sequence[int], *, needed: Collection[int]) -> dict[int, Span]:
        """Where turns are, without their ends.

        Args:
            needed: those that must be found.

        Raises:
            DataError: one of them is not.
        """
        chat = self.chat
        finder = TurnFinder(chat.text, chat.messages, chat.render, self._tokens.every, lambda: self.others.places)
        places = finder.places(wanted)
        for index in wanted:
            message = chat.messages[index]
            drops_thoughts = not content_of(message).strip() and not called_names(message)
            if index in needed and index not in places and not drops_thoughts:
                raise DataError(
                    f"{chat.where}: the chat template does not show messages[{index}] (assistant) as it stands, so its "
                    "tokens cannot be found. Change the row, or give a template with {% generation %} by "
                    "data.chat_template=FILE"
                )
        return places

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        """The characters of turns that are learnt: all but what others say there.

        Raises:
            DataError: it cannot be told what others say there.
        """
        spans: list[Span] = []
        for turn in turns:
            if self._is_content_alone(turn):
                spans.append(turn.span)
                continue
            if self.others.within(self._besides_content(turn)):
                raise DataError(
                    f"{self.chat.where}: the chat template writes what is said in another turn into a turn of the "
                    "assistant, in a way of its own, so that it cannot be left out of what is learnt. Change the row, "
                    "or give another template by data.chat_template=FILE"
                )
            spans += cut_out(turn.span, self.others.places)
        return spans

    def ends(self, turn: Turn, ends: Collection[str]) -> bool:
        """Whether the end of a turn is learnt.

        Args:
            ends: tokens that end the turns of a plain conversation; a call may end with another special token.
        """
        messages = self.chat.messages
        span, content = turn.span, "" if turn.index is None else content_of(messages[turn.index])
        if self._train_on is TrainOn.all:
            span = with_turn_end(self.chat.text, span, self._tokens.every, self._tokens.eos)
        calls = any(called_names(m) for m in (messages if turn.index is None else [messages[turn.index]]))
        eos = [self._tokens.eos] if self._tokens.eos else []
        tokens = [*ends, *eos, *(self._tokens.special if calls else ())]
        return ends_in_token(self.chat.text[slice(*span)], content, tokens)

    def shortened(self, asked: Collection[int], learnt: Sequence[Turn]) -> int:
        """Turns that are to be learnt, and of which less stands in the text than the row says."""
        spans = {turn.index: turn.span for turn in learnt}
        whole = (0, len(self.chat.text)) if None in spans or self._train_on is TrainOn.all else (0, 0)
        return sum(
            not shows_all(self.chat.text[slice(*spans.get(index, whole))], self.chat.messages[index])
            for index in self.chat.speaking
            if index in asked
        )

    def _unmarked(self, asked: Collection[int]) -> list[Turn]:
        """The turns that are asked for, each with the one before it, or all where all text is learnt."""
        chat, whole = self.chat, self._train_on is TrainOn.all
        before = {index for index, following in pairwise(chat.speaking) if following in asked}
        wanted = [index for index in chat.speaking if whole or index in asked or index in before]
        places = self.places(wanted, needed=set(chat.speaking) - set(asked) if whole else set(asked))
        turns, floor = [], 0
        for index, place in places.items():
            span = with_turn_end(chat.text, place, self._tokens.every, self._tokens.eos)
            if index - 1 not in wanted or index - 1 in places:  # otherwise it might begin in the turn before
                span = self._behind_prompt(span, place[1], floor)
            turns.append(Turn(index, span))
            floor = span[1]
        return turns

    def _behind_prompt(self, span: Span, content_end: int, floor: int) -> Span:
        begun = behind_prompt(self.chat.text, span, content_end=content_end, floor=floor, prompt=self._prompt())
        between = self.chat.text[begun[0] : span[0]]
        if not between.strip():
            return begun
        if self.others.within(between):
            return span
        floor = max(floor, self.others.last_end(span[0]))
        return behind_prompt(self.chat.text, span, content_end=content_end, floor=floor, prompt=self._prompt())

    def _besides_content(self, turn: Turn) -> str:
        """What stands in a turn but for its own content and thoughts."""
        inside, messages = self.chat.text[slice(*turn.span)], self.chat.messages
        for message in messages if turn.index is None else [messages[turn.index]]:
            own = (content_of(message).strip(), reasoning_of(message).strip()) if message["role"] == "assistant" else ()
            for said in filter(None, own):
                inside = inside.replace(said, "")
        return inside

    def _is_content_alone(self, turn: Turn) -> bool:
        inside = without_tokens(self.chat.text[slice(*turn.span)], self._tokens.every)
        own = "" if turn.index is None else content_of(self.chat.messages[turn.index])
        return squeezed(inside) == squeezed(without_tokens(own, self._tokens.every))

    def _is_blank(self, turn: Turn) -> bool:
        inside = self.chat.text[slice(*turn.span)]
        says_nothing = turn.index is not None and not says_something(self.chat.messages[turn.index])
        return is_blank(inside, self._tokens.special) or (says_nothing and is_blank(inside, self._tokens.every))


def _owned(span: Span, places: Mapping[int, Span]) -> list[Turn]:
    """The turns that a mark is about, each with its part of it."""
    owners = [index for index, place in places.items() if span[0] < place[1] and place[0] < span[1]]
    edges = [span[0], *(places[index][0] for index in owners[1:]), span[1]]
    return [Turn(index, part) for index, part in zip(owners or [None], pairwise(edges), strict=True)]
