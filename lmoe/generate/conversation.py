"""A conversation or a text that is to be answered, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.chats.template_input import content_of
from lmoe.data.rows.row import Message
from lmoe.data.rows.turns import Turns
from lmoe.errors import DataError


@dataclass(slots=True, frozen=True, kw_only=True)
class Asked:
    """What an answer is to follow.

    Args:
        ids: (T,) its tokens: of a conversation under the chat template, with the prompt for an answer.
        messages: the conversation; of a plain text none.
        given: the same as the template takes it.
        tools: functions that the assistant may call.
    """

    ids: Tensor
    messages: Sequence[Message]
    given: Sequence[Message]
    tools: list[dict[str, Any]] | None = None


def asked(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
) -> Asked:
    """A conversation, or one user turn, under the chat template, which is given it in the form in which training gives
    it.

    Without a template the texts stand one after the other, as they are.

    Args:
        prompt: what the user says, or turns with role and content, as rows have them; fields that rows do not have are
            for the template.
        tools: functions that the assistant may call, as a chat template takes them.

    Raises:
        DataError: no turn, or something that is none; the template refuses the conversation, or does not come to an
            end; tools without a template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)
    shown: list[Any] | None = list(tools) if tools else None
    if tokenizer.chat_template is None:
        if shown:
            raise DataError("tools cannot be shown to the model: its tokenizer has no chat template")
        ids = text_ids(tokenizer, "\n".join(content_of(message) for message in messages))
        return Asked(ids=ids[0], messages=messages, given=messages)
    given = ChatTemplate.of(tokenizer, None).asked(messages, shown)
    encoded = tokenizer.apply_chat_template(
        given, tools=shown, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: Tensor = encoded["input_ids"]  # type: ignore[index, assignment]
    return Asked(ids=ids[0], messages=messages, given=given, tools=shown)


def _turns(prompt: Sequence[Message]) -> list[Message]:
    """A conversation of somebody's own making, in the shape that rows have.

    Raises:
        DataError: no turn, or something that is none.
    """
    given, turns = list(prompt), Turns()
    if not given:
        raise DataError("the prompt is empty")
    turns.add_all(given, "messages", "the prompt")
    return [{**own, **turn} for own, turn in zip(given, turns.messages, strict=True)]


def asked_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Asked:
    """A plain text that is to be continued."""
    return Asked(ids=text_ids(tokenizer, text)[0], messages=(), given=())


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> Tensor:
    """(1, T) token ids of a conversation, or of one user turn, as `asked`."""
    return asked(tokenizer, prompt).ids[None]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """(1, T) token ids of plain text, which is continued without a template."""
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()  # type: ignore[union-attr]
