"""Render chat messages once, and say which characters of the rendering are to be learnt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmoe.data.render_limit import render, render_with_generation
from lmoe.data.spans import Message, Span, content_spans, with_turn_end, without_blank
from lmoe.errors import DataError
from lmoe.files.small_file import Reader
from lmoe.files.wording import LONGEST_REASON, shown

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
        spans: (start, end) characters of the assistant's turns, each with the token that ends it.
    """

    text: str
    spans: list[Span]


class ChatTemplate:
    """A Jinja chat template with the special tokens of one tokenizer.

    Args:
        source: the template, or None where the tokenizer has none: an error only once a chat is rendered.
        special_tokens_map: special tokens by name (eos_token, …), which templates may write.
        special_tokens: every special token's text.
    """

    def __init__(self, source: str | None, special_tokens_map: dict[str, Any], special_tokens: Sequence[str]) -> None:
        self.source = source
        self.has_generation = source is not None and GENERATION.search(source) is not None
        self._map, self._special = special_tokens_map, list(special_tokens)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, file: str | None) -> "ChatTemplate":
        """The template in `file`, or else the tokenizer's own.

        Raises:
            DataError: the file cannot be read.
        """
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens})
        return cls(_source(tokenizer, file), dict(tokenizer.special_tokens_map), special)

    def render(self, messages: Sequence[Message], where: str) -> Rendered:
        """Render a conversation and find the assistant's turns; blank turns have no span.

        Raises:
            DataError: no template, a template that refuses the conversation, or a turn that cannot be found.
        """
        text, generated = self._run(messages, where)
        if self.has_generation:
            return Rendered(text, without_blank(text, generated, self._special))
        spans = content_spans(text, messages, lambda probe: self._run(probe, where)[0], where)
        eos = self._map.get("eos_token")
        return Rendered(text, [with_turn_end(text, span, self._special, eos) for span in spans])

    def render_answer(self, messages: Sequence[Message], where: str) -> Rendered:
        """Render a conversation and find the characters of its assistant contents, without the token that ends a turn.

        Raises:
            DataError: as `render`.
        """
        text = self._run(messages, where)[0]
        return Rendered(text, content_spans(text, messages, lambda probe: self._run(probe, where)[0], where))

    def turn_ends(self) -> list[str]:
        """The special tokens that `render` gives to the assistant's turns as their ends; none where there is no such
        token, or the template refuses a plain conversation."""
        ends: list[str] = []
        for messages in (PROBE[:2], PROBE):
            try:
                rendered = self.render(messages, "a conversation to find the end of a turn")
            except DataError:
                continue
            for start, end in rendered.spans:
                turn = rendered.text[start:end].rstrip()
                ends += sorted((token for token in self._special if turn.endswith(token)), key=len)[-1:]
        return list(dict.fromkeys(ends))

    def check(self, messages: Sequence[Message]) -> None:
        """Render a conversation that an answer is to follow, to see that the template takes it and comes to an end.

        Raises:
            DataError: no template, or one that refuses the conversation.
        """
        self._run(messages, "", answer=True)

    def _run(self, messages: Sequence[Message], where: str, *, answer: bool = False) -> tuple[str, list[Span]]:
        where = f"{where}: " if where else ""
        if self.source is None:
            raise DataError(
                f"{where}the tokenizer has no chat template. Set data.chat_template=FILE, "
                "use a tokenizer with a template, or give plain text rows"
            )
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        variables = {**self._map, **given, "add_generation_prompt": answer}
        try:
            if self.has_generation:
                return render_with_generation(self.source, variables)
            return render(self.source, variables), []
        except Exception as error:  # of the template, which is a program of its own
            reason = shown(" ".join(str(error).split()) or type(error).__name__, longest=LONGEST_REASON)
            raise DataError(f"{where}the chat template refuses this conversation: {reason}") from None


def take_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Give a tokenizer the template in a file, with which it is then saved; None: it keeps its own.

    Raises:
        DataError: the file cannot be read.
    """
    if file is not None:
        tokenizer.chat_template = read_template(file)


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


def _source(tokenizer: PreTrainedTokenizerBase, file: str | None) -> str | None:
    if file is not None:
        return read_template(file)
    return tokenizer.get_chat_template() if tokenizer.chat_template else None
