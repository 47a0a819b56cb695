"""One row of a data set, whatever format it came in."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn as a chat template takes it: role and content, which are text, and where the row has them reasoning_content,
tool_calls (their arguments as an object), tool_call_id and name."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """One sample: a conversation or plain text.

    Args:
        where: file and line, or data set and row, for messages to the user.
        domain: the row's own, or else that of its source or file.
        messages: the conversation, or None for plain text. Of a pair what both answers follow; it may be a prompt
            alone.
        text: plain text, or None for a conversation.
        muted: indices of the assistant's turns that carry no label.
        tools: functions that the assistant may call, as a chat template takes them.
        chosen, rejected: two answers to `messages`, of which the first is preferred; both or none.
        label: whether the answer is a good one; None where the row does not say.
        answer: what an answer to the prompt is checked against; None where the row has none.
        format: name of the format that was found, for people.
        ignored: fields that nothing is made of.
    """

    where: str
    domain: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    muted: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] | None = None
    chosen: tuple[Message, ...] | None = None
    rejected: tuple[Message, ...] | None = None
    label: bool | None = None
    answer: str | None = None
    format: str = ""
    ignored: tuple[str, ...] = ()
