"""Render chat messages once, and say which characters of the rendering are to be learnt."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.render_limit import render, render_with_generation
from lmoe.data.row import Message, Row
from lmoe.data.spans import Span, TurnFinder
from lmoe.data.template_input import (
    CallForm,
    call_forms,
    called_names,
    content_of,
    given_messages,
    says_something,
    with_names,
)
from lmoe.data.template_settings import reads_clock, variables_of, with_settings
from lmoe.data.turn_labels import behind_prompt, ends_in_token, is_blank, shows_all, with_turn_end
from lmoe.errors import DataError
from lmoe.files.small_file import Reader
from lmoe.files.wording import LONGEST_REASON, shown
from lmoe.rules.template import CLOCK
from lmoe.vocabulary import TrainOn

PROBE: list[Message] = [
    {"role": "user", "content": "Good morning."},
    {"role": "assistant", "content": "Hello there!"},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am well."},
]
"""A conversation that any template can render."""
TEMPLATE_FILE = "chat_template.jinja"
"""Where Transformers keeps the template of a tokenizer that it saves."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(slots=True, frozen=True)
class Rendered:
    """A conversation as text.

    Args:
        text: what is tokenised, special tokens written out.
        spans: (start, end) characters that are learnt, in order: turns of the assistant, each with the token that ends
            it.
        turns: assistant turns that are learnt.
        endless: those of them whose end is not learnt, so that a model would not learn to stop.
        shortened: assistant turns of which the template shows less than the row says.
    """

    text: str
    spans: list[Span]
    turns: int = 0
    endless: int = 0
    shortened: int = 0


@dataclass(slots=True, frozen=True, kw_only=True)
class Chat:
    """A row on its way through a template.

    Args:
        messages: as the template takes them.
        tools: functions that may be called.
        where: file and line.
        text: the rendering.
        marked: what {% generation %} marks in it.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str
    text: str
    marked: list[Span]

    @property
    def assistant(self) -> list[int]:
        """Indices of the assistant's turns."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def speaking(self) -> list[int]:
        """Those of them that say something."""
        return [index for index in self.assistant if says_something(self.messages[index])]


class Turn(NamedTuple):
    """A turn of the assistant in a rendering; index None: it is not known which."""

    index: int | None
    span: Span


class ChatTemplate:
    """A Jinja chat template with the special tokens of one tokenizer.

    Args:
        source: the template, or None where the tokenizer has none: an error only once a chat is rendered.
        special_tokens_map: special tokens by name (eos_token, …), which templates may write.
        special_tokens: every special token's text.
        added_tokens: those of the other tokens that were added to the vocabulary.
        train_on: the turns that are learnt.
        day: what a template that reads the date is told, YYYY-MM-DD; None: today.
    """

    def __init__(
        self,
        source: str | None,
        special_tokens_map: dict[str, Any],
        special_tokens: Sequence[str],
        added_tokens: Sequence[str] = (),
        *,
        train_on: TrainOn = TrainOn.assistant,
        day: str | None = None,
    ) -> None:
        self.source = source
        self.has_generation = source is not None and GENERATION.search(source) is not None
        self._map, self._special, self._train_on = special_tokens_map, list(special_tokens), train_on
        self._tokens = [*special_tokens, *(token for token in added_tokens if token.strip())]
        self.reads_clock = reads_clock(source)
        self._day = (day or date.today().isoformat()) if self.reads_clock else None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        file: str | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        train_on: TrainOn = TrainOn.assistant,
        day: str | None = None,
    ) -> "ChatTemplate":
        """The template in `file`, or else the tokenizer's own.

        Args:
            settings: variables of the template, as in data.template_kwargs.
            train_on, day: as for the class.

        Raises:
            DataError: the file cannot be read, or the template does not read a variable.
        """
        added = tokenizer.added_tokens_decoder.values()
        special = sorted({*(token.content for token in added if token.special), *tokenizer.all_special_tokens})
        others = sorted({token.content for token in added} - {*special})
        source = _source(tokenizer, file, settings or {})
        return cls(source, dict(tokenizer.special_tokens_map), special, others, train_on=train_on, day=day)

    @classmethod
    def of_data(cls, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> "ChatTemplate":
        """The template by which the rows of a data section are rendered.

        Raises:
            DataError: as `of`.
        """
        settings, day = config.template_kwargs, config.template_date
        return cls.of(tokenizer, config.chat_template, settings, train_on=config.train_on, day=day)

    @property
    def identity(self) -> str | None:
        """All of the template that a rendering and its labels depend on; None: there is no template."""
        if self.source is None or (self._train_on is TrainOn.assistant and self._day is None):
            return self.source
        return json.dumps({"source": self.source, "train_on": self._train_on, "day": self._day}, sort_keys=True)

    def render(self, row: Row) -> Rendered:
        """Render a conversation and find the turns that are learnt; turns that say nothing have no span.

        Raises:
            DataError: no template, a template that refuses the conversation or shows no tools, or a turn that cannot be
                found.
        """
        problems: list[DataError] = []
        for chat in self._chats(row):
            try:
                return self._labelled(chat, row.muted)
            except DataError as error:
                problems.append(error)
        raise problems[0]

    def _labelled(self, chat: Chat, muted: Collection[int]) -> Rendered:
        asked = set(chat.assistant) - set(muted)
        if self._train_on is TrainOn.last:
            asked &= set(chat.assistant[-1:])
        turns = self._turns(chat, asked)
        learnt = [turn for turn in turns if turn.index is None or turn.index in asked]
        spans = [turn.span for turn in learnt]
        if self._train_on is TrainOn.all:
            spans = _others(len(chat.text), [turn.span for turn in turns if turn.index in muted])
        return Rendered(
            text=chat.text,
            spans=spans,
            turns=len(learnt),
            endless=sum(not self._ends(chat, turn) for turn in learnt),
            shortened=self._shortened(chat, asked, learnt),
        )

    def render_answer(self, messages: Sequence[Message], where: str) -> Rendered:
        """Render a conversation and find the characters of its assistant contents, without the token that ends a turn.

        Raises:
            DataError: as `render`.
        """
        chat = next(self._chats(Row(where=where, domain="", messages=tuple(messages))))
        return Rendered(chat.text, list(self._places(chat, chat.speaking, needed=set(chat.speaking)).values()))

    def turn_ends(self) -> list[str]:
        """The tokens that `render` gives to the assistant's turns as their ends; none where there is no such token, or
        the template refuses a plain conversation."""
        ends: list[str] = []
        for messages in (PROBE[:2], PROBE):
            try:
                row = Row(where="a conversation to find an end", domain="", messages=tuple(messages))
                chat = next(self._chats(row))
                turns = self._turns(chat, set(chat.assistant))
            except DataError:
                continue
            for turn in turns:
                said = messages[1 if turn.index is None else turn.index]["content"]
                behind = chat.text[slice(*turn.span)].rpartition(said)[2].rstrip()
                ends += sorted((token for token in self._tokens if behind.endswith(token)), key=len)[-1:]
        return list(dict.fromkeys(ends))

    def check(self, messages: Sequence[Message]) -> None:
        """Render a conversation that an answer is to follow, to see that the template takes it and comes to an end.

        Raises:
            DataError: no template, or one that refuses the conversation.
        """
        self._run(messages, "", answer=True)

    def _chats(self, row: Row) -> Iterator[Chat]:
        """The rendering of a row; of one with calls of tools in each form in which the template shows them.

        Raises:
            DataError: there is no such form.
        """
        messages, tools = row.messages or (), None if row.tools is None else list(row.tools)
        calls = [name for message in messages for name in called_names(message)]
        if self.source is not None and tools is not None and "tools" not in variables_of(self.source):
            raise DataError(self._no_tools(row.where, "tools"))
        if self.source is not None and calls and "tool_calls" not in self.source:
            raise DataError(self._no_tools(row.where, "calls of tools"))
        problem: DataError | None = None
        first: str | None = None
        for form in call_forms(self.source or "") if calls else [CallForm()]:
            developer = self.source is not None and "developer" in self.source
            given = given_messages(messages, developer=developer, form=form)
            try:
                text, marked = self._run(given, row.where, tools=tools)
            except DataError as error:
                problem = problem or error
                continue
            chat = Chat(messages=given, tools=tools, where=row.where, text=text, marked=marked)
            if first is not None and text.count("None") > first.count("None"):
                continue  # it writes what stands for no content
            if not calls or self._shows_calls(chat, len(calls)):
                first = first or text
                yield chat
            else:
                problem = DataError(
                    f"{row.where}: the chat template does not show the calls of tools that the assistant makes; give "
                    "one that does by data.chat_template=FILE, or take the row out"
                )
        if first is None:
            assert problem is not None
            raise problem

    def _no_tools(self, where: str, what: str) -> str:
        return (
            f"{where}: the chat template shows no {what}, and the row has some; give a template that does by "
            "data.chat_template=FILE, or take the row out"
        )

    def _shows_calls(self, chat: Chat, count: int) -> bool:
        """Whether the name of each function that is called changes the text."""
        names = [f"\ue000{number}\ue001" for number in range(count)]
        try:
            text = self._run(with_names(chat.messages, names), chat.where, tools=chat.tools)[0]
        except DataError:
            return True  # it knows the names: what is shown is seen when the turn is looked for
        return all(name in text for name in names)

    def _turns(self, chat: Chat, asked: Collection[int]) -> list[Turn]:
        """The assistant's turns with their ends, in order: those that are asked for, and muted ones where all text is
        learnt, which has to leave them out."""
        if not self.has_generation:
            whole = self._train_on is TrainOn.all
            wanted = [index for index in chat.speaking if whole or index in asked]
            needed = set(chat.speaking) - set(asked) if whole else set(asked)
            return self._unmarked(chat, self._places(chat, wanted, needed=needed))
        if len(chat.marked) == len(chat.assistant):
            turns = [Turn(index, span) for index, span in zip(chat.assistant, chat.marked, strict=True)]
        elif not set(chat.assistant) - set(asked):
            turns = [Turn(None, span) for span in chat.marked]
        else:  # the marks must be told apart
            places = self._places(chat, chat.speaking, needed=set(chat.speaking) - set(asked))
            turns = [Turn(_owner(span, places), span) for span in chat.marked]
        return [turn for turn in turns if not self._is_blank(chat, turn)]

    def _is_blank(self, chat: Chat, turn: Turn) -> bool:
        inside = chat.text[slice(*turn.span)]
        says_nothing = turn.index is not None and not says_something(chat.messages[turn.index])
        return is_blank(inside, self._special) or (says_nothing and is_blank(inside, self._tokens))

    def _unmarked(self, chat: Chat, places: Mapping[int, Span]) -> list[Turn]:
        turns, floor = [], 0
        for index, place in places.items():
            span = with_turn_end(chat.text, place, self._tokens, self._map.get("eos_token"))
            span = behind_prompt(chat.text, span, content_end=place[1], floor=floor, prompt=self._prompt)
            turns.append(Turn(index, span))
            floor = span[1]
        return turns

    def _places(self, chat: Chat, wanted: Sequence[int], *, needed: Collection[int]) -> dict[int, Span]:
        """Where turns are, without their ends.

        Args:
            needed: those that must be found.
        """

        def render_again(messages: Sequence[Message], answer: bool) -> str:
            return self._run(messages, chat.where, tools=chat.tools, answer=answer)[0]

        places = TurnFinder(chat.text, chat.messages, render_again, self._tokens).places(wanted)
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

    def _ends(self, chat: Chat, turn: Turn) -> bool:
        """Whether the end of a turn is learnt."""
        span, content = turn.span, "" if turn.index is None else content_of(chat.messages[turn.index])
        if self._train_on is TrainOn.all:
            span = with_turn_end(chat.text, span, self._tokens, self._map.get("eos_token"))
        return ends_in_token(chat.text[slice(*span)], content, self._tokens)

    def _shortened(self, chat: Chat, asked: Collection[int], learnt: Sequence[Turn]) -> int:
        """Turns that are to be learnt, and of which less stands in the text than the row says."""
        spans = {turn.index: turn.span for turn in learnt}
        whole = (0, len(chat.text)) if None in spans or self._train_on is TrainOn.all else (0, 0)
        return sum(
            not shows_all(chat.text[slice(*spans.get(index, whole))], chat.messages[index])
            for index in chat.speaking
            if index in asked
        )

    @cached_property
    def _prompt(self) -> str:
        """What the template writes where an answer is to follow; "" where nothing, or elsewhere."""
        try:
            without, given = (self._run(PROBE[:1], "", answer=answer)[0] for answer in (False, True))
        except DataError:
            return ""
        return given.removeprefix(without) if given.startswith(without) else ""

    def _run(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        answer: bool = False,
    ) -> tuple[str, list[Span]]:
        where = f"{where}: " if where else ""
        if self.source is None:
            raise DataError(
                f"{where}the tokenizer has no chat template. Set data.chat_template=FILE, "
                "use a tokenizer with a template, or give plain text rows"
            )
        given = {"messages": [dict(message) for message in messages], "tools": tools, "documents": None}
        variables = {**self._map, **given, "add_generation_prompt": answer}
        if self._day is not None:
            variables[CLOCK] = datetime.fromisoformat(self._day).strftime
        try:
            if self.has_generation:
                return render_with_generation(self.source, variables)
            return render(self.source, variables), []
        except Exception as error:  # of the template, which is a program of its own
            reason = shown(" ".join(str(error).split()) or type(error).__name__, longest=LONGEST_REASON)
            raise DataError(f"{where}the chat template refuses this conversation: {reason}") from None


def _owner(span: Span, places: Mapping[int, Span]) -> int | None:
    """The turn that a mark is about."""
    return next((index for index, place in places.items() if span[0] < place[1] and place[0] < span[1]), None)


def take_template(
    tokenizer: PreTrainedTokenizerBase, file: str | None, settings: Mapping[str, Any] | None = None
) -> None:
    """Give a tokenizer the template in a file, None: its own, with variables set; it is then saved with that.

    Args:
        settings: variables of the template, as in data.template_kwargs.

    Raises:
        DataError: the file cannot be read, or the template does not read a variable.
    """
    if file is not None or settings:
        tokenizer.chat_template = _source(tokenizer, file, settings or {})


def read_template(file: str) -> str:
    """Text of the chat template in a file.

    Raises:
        DataError: the file cannot be read.
    """
    reader = Reader(error=DataError, most=1_000_000, what="a chat template")
    try:
        return reader.text(Path(file).expanduser())
    except DataError as error:
        raise DataError(f"data.chat_template={error}") from None


def _source(tokenizer: PreTrainedTokenizerBase, file: str | None, settings: Mapping[str, Any]) -> str | None:
    if file is not None:
        source = read_template(file)
    else:
        source = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if settings and source is None:
        raise DataError(
            f"data.template_kwargs sets {', '.join(settings)}, and the tokenizer has no chat template. Set "
            "data.chat_template=FILE, or leave it out"
        )
    return with_settings(source, settings) if source is not None and settings else source


def _others(size: int, spans: Collection[Span]) -> list[Span]:
    """What of a text of `size` characters lies outside of spans that are in order."""
    edges = [0, *(edge for span in spans for edge in span), size]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
