"""Render chat messages once, and say which characters of the rendering are to be learnt."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.chats.chat_turns import Chat, ChatTurns, TokenTexts
from lmoe.data.chats.render_limit import render, render_with_generation
from lmoe.data.chats.spans import Render, Span, cut_out
from lmoe.data.chats.template_input import CallForm, call_forms, called_names, given_messages, with_names
from lmoe.data.chats.template_settings import reads_clock, variables_of
from lmoe.data.chats.template_source import DEFAULT, TOOL_USE, template_sources
from lmoe.data.chats.turn_labels import AnswerPrompt, earlier_span, is_blank
from lmoe.data.rows.row import Message, Row
from lmoe.errors import DataError
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
LABELS = 2
"""Of the way in which turns are labelled; 1 was that of the content and a special token."""
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


class ChatTemplate:
    """A Jinja chat template with the special tokens of one tokenizer.

    Args:
        source: the template, or None where the tokenizer has none: an error only once a chat is rendered.
        special_tokens_map: special tokens by name (eos_token, …), which templates may write.
        special_tokens: every special token's text.
        added_tokens: those of the other tokens that were added to the vocabulary.
        train_on: the turns that are learnt.
        day: what a template that reads the date is told, YYYY-MM-DD; None: today.
        for_tools: the template of rows with tools, where that is another one.
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
        for_tools: str | None = None,
    ) -> None:
        self.source = source
        self.has_generation = source is not None and GENERATION.search(source) is not None
        self._map, self._train_on = special_tokens_map, train_on
        every = [*special_tokens, *(token for token in added_tokens if token.strip())]
        self._tokens = TokenTexts(list(special_tokens), every, special_tokens_map.get("eos_token"))
        self._for_tools: ChatTemplate | None = None
        if for_tools is not None:
            parts = (for_tools, special_tokens_map, special_tokens, added_tokens)
            self._for_tools = ChatTemplate(*parts, train_on=train_on, day=day)
        own_clock = reads_clock(source)
        self.reads_clock = own_clock or (self._for_tools is not None and self._for_tools.reads_clock)
        self._day = (day or date.today().isoformat()) if own_clock else None

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
        sources = template_sources(tokenizer, file, settings or {})
        names = dict(tokenizer.special_tokens_map)
        how = {"train_on": train_on, "day": day, "for_tools": sources.get(TOOL_USE)}
        return cls(sources.get(DEFAULT), names, special, others, **how)

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
        """All of the template that a rendering and its labels depend on; None: there is no template.

        It is the text alone where turns are labelled as they were when they were their contents and a special token, so
        that runs of that time find their rows again; others are not resumed with other labels.
        """
        others = {
            "labels": LABELS if self._has_other_labels else None,
            "for_tools": None if self._for_tools is None else self._for_tools.identity,
        }
        others = {name: value for name, value in others.items() if value is not None}
        if not others and (self.source is None or (self._train_on is TrainOn.assistant and self._day is None)):
            return self.source
        parts = {"source": self.source, "train_on": self._train_on, "day": self._day, **others}
        return json.dumps(parts, sort_keys=True)

    @cached_property
    def _has_other_labels(self) -> bool:
        """Whether a plain conversation has other labels than when a turn was its content and a special token."""
        for messages in (PROBE[:2], PROBE):
            try:
                found = self._probed(messages)
                turns = found.turns(found.chat.assistant)
                chat, spans = found.chat, found.spans(turns)
                if chat.marked is not None:
                    inside = [chat.text[slice(*span)] for span in chat.marked]
                    pairs = zip(chat.marked, inside, strict=True)
                    before = [span for span, text in pairs if not is_blank(text, self._tokens.special)]
                else:
                    special, eos = self._tokens.special, self._tokens.eos
                    places = found.places(chat.assistant, needed=chat.assistant).values()
                    before = [earlier_span(chat.text, place, special, eos) for place in places]
            except DataError:
                continue
            if _characters(spans) != _characters(before):
                return True
        return False

    def render(self, row: Row) -> Rendered:
        """Render a conversation and find the turns that are learnt; turns that say nothing have no span.

        Raises:
            DataError: no template, a template that refuses the conversation or shows no tools, or a turn that cannot be
                found.
        """
        if row.tools is not None and self._for_tools is not None:
            return self._for_tools.render(row)
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
        found = self._turns_of(chat)
        turns = found.turns(asked)
        learnt = [turn for turn in turns if turn.index is None or turn.index in asked]
        if self._train_on is TrainOn.all:
            spans = cut_out((0, len(chat.text)), [turn.span for turn in turns if turn.index in muted])
        else:
            spans = found.spans(learnt)
        ends = self.turn_ends() if learnt else []
        return Rendered(
            text=chat.text,
            spans=spans,
            turns=len(learnt),
            endless=sum(not found.ends(turn, ends) for turn in learnt),
            shortened=found.shortened(asked, learnt),
        )

    def _turns_of(self, chat: Chat) -> ChatTurns:
        return ChatTurns(chat, self._tokens, lambda: self._prompt, self._train_on)

    def _probed(self, messages: Sequence[Message]) -> ChatTurns:
        row = Row(where="a plain conversation", domain="", messages=tuple(messages))
        return ChatTurns(next(self._chats(row)), self._tokens, lambda: self._prompt)

    def render_answer(self, messages: Sequence[Message], where: str) -> Rendered:
        """Render a conversation and find the characters of its assistant contents, without the token that ends a turn.

        Raises:
            DataError: as `render`.
        """
        chat = next(self._chats(Row(where=where, domain="", messages=tuple(messages))))
        return Rendered(chat.text, list(self._turns_of(chat).places(chat.speaking, needed=set(chat.speaking)).values()))

    def turn_ends(self) -> list[str]:
        """The tokens that `render` gives to the assistant's turns as their ends; none where there is no such token, or
        the template refuses a plain conversation."""
        return list(self._ends)

    @cached_property
    def _ends(self) -> list[str]:
        ends: list[str] = []
        for messages in (PROBE[:2], PROBE):
            try:
                found = self._probed(messages)
                turns = found.turns(found.chat.assistant)
            except DataError:
                continue
            for turn in turns:
                said = messages[1 if turn.index is None else turn.index]["content"]
                behind = found.chat.text[slice(*turn.span)].rpartition(said)[2].rstrip()
                ends += sorted((token for token in self._tokens.every if behind.endswith(token)), key=len)[-1:]
        return list(dict.fromkeys(ends))

    def asked(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[Message]:
        """A conversation that an answer is to follow, as the template takes it: with calls of tools in the first form
        that it renders to an end.

        Args:
            tools: functions that the assistant may call.

        Raises:
            DataError: no template, or one that shows no tools or refuses the conversation.
        """
        if tools is not None and self._for_tools is not None:
            return self._for_tools.asked(messages, tools)
        if tools is not None and not self._shows_tools():
            raise DataError("the chat template shows the model no tools; leave them out")
        problem: DataError | None = None
        for given in self._given(messages):
            try:
                self._run(given, "", tools=None if tools is None else list(tools), answer=True)
            except DataError as error:
                problem = problem or error
            else:
                return given
        assert problem is not None
        raise problem

    def _chats(self, row: Row) -> Iterator[Chat]:
        """The rendering of a row; of one with calls of tools in each form in which the template shows them.

        Raises:
            DataError: there is no such form.
        """
        messages, tools = row.messages or (), None if row.tools is None else list(row.tools)
        calls = [name for message in messages for name in called_names(message)]
        if tools is not None and not self._shows_tools():
            raise DataError(self._no_tools(row.where, "tools"))
        if self.source is not None and calls and "tool_calls" not in self.source:
            raise DataError(self._no_tools(row.where, "calls of tools"))
        problem: DataError | None = None
        first: str | None = None
        for given in self._given(messages):
            try:
                text, marked = self._run(given, row.where, tools=tools)
            except DataError as error:
                problem = problem or error
                continue
            chat = Chat(
                messages=given,
                tools=tools,
                where=row.where,
                text=text,
                marked=marked if self.has_generation else None,
                render=self._render_again(row.where, tools),
            )
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

    def _shows_tools(self) -> bool:
        """Whether the template reads tools; without a template that is another error."""
        return self.source is None or "tools" in variables_of(self.source)

    def _given(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """The messages in each form in which templates take them."""
        source = self.source or ""
        calls = any(called_names(message) for message in messages)
        for form in call_forms(source) if calls else [CallForm()]:
            yield given_messages(messages, developer="developer" in source, form=form)

    def _render_again(self, where: str, tools: list[dict[str, Any]] | None) -> Render:
        return lambda messages, answer: self._run(messages, where, tools=tools, answer=answer)[0]

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

    @cached_property
    def _prompt(self) -> AnswerPrompt:
        """What the template writes where an answer is to follow."""
        try:
            question, asking = (self._run(PROBE[:1], "", answer=answer)[0] for answer in (False, True))
        except DataError:
            return AnswerPrompt()
        try:
            answered = self._run(PROBE[:2], "")[0]
        except DataError:
            answered = ""
        return AnswerPrompt.of(question, asking, answered, PROBE[1]["content"])

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


def _characters(spans: Collection[Span]) -> set[int]:
    return {place for span in spans for place in range(*span)}
