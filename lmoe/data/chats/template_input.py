"""What a chat template is given of a row: templates differ in how they take roles, thoughts and calls of tools."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmoe.data.rows.row import Message


@dataclass(slots=True, frozen=True, kw_only=True)
class CallForm:
    """A way to hand over turns that call tools.

    Args:
        as_text: arguments are JSON text, not an object.
        no_content: what stands for the content of a turn that only calls.
    """

    as_text: bool = False
    no_content: str | None = ""


CALL_FORMS = (
    CallForm(),
    CallForm(as_text=True),
    CallForm(no_content=None),
    CallForm(as_text=True, no_content=None),
)
"""In the order in which they are tried."""
ASKS_FOR_NONE = re.compile(r"""content(['"]\])? is (not )?none""")
"""In a template that tells a turn which only calls by a content of null."""


def call_forms(source: str) -> Sequence[CallForm]:
    """The forms to try with a template, in order."""
    null_first = ASKS_FOR_NONE.search(source) is not None
    return sorted(CALL_FORMS, key=lambda form: (form.no_content is None) != null_first)


class JsonObject(dict[str, Any]):
    """An object that a template writes as JSON, whether it says `{{ arguments }}` or `{{ arguments | tojson }}`."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def given_messages(messages: Sequence[Message], *, developer: bool, form: CallForm) -> list[Message]:
    """The messages as a template takes them.

    Args:
        developer: the template knows this role; to others it is the system's.
        form: of calls.
    """
    given = []
    for message in messages:
        message = dict(message)
        if message["role"] == "developer" and not developer:
            message["role"] = "system"
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_given_call(call, form) for call in calls]
            message["content"] = message["content"] or form.no_content
        given.append(message)
    return given


def _given_call(call: dict[str, Any], form: CallForm) -> dict[str, Any]:
    function = call["function"]
    arguments = JsonObject(function["arguments"])
    return {**call, "function": {**function, "arguments": str(arguments) if form.as_text else arguments}}


def called_names(message: Message) -> list[str]:
    """Names of the functions that a turn calls."""
    return [call["function"]["name"] for call in message.get("tool_calls") or ()]


def with_names(messages: Sequence[Message], names: Sequence[str]) -> list[Message]:
    """The messages with other names of the functions that are called, one a call."""
    rest, renamed = iter(names), []
    for message in messages:
        if message.get("tool_calls"):
            calls = [{**c, "function": {**c["function"], "name": next(rest)}} for c in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        renamed.append(message)
    return renamed


def content_of(message: Message) -> str:
    """What a turn says, "" where it only calls."""
    return message["content"] or ""


def reasoning_of(message: Message) -> str:
    """What a turn thinks before it speaks, as a field of its own."""
    return message.get("reasoning_content") or ""


def says_something(message: Message) -> bool:
    """Whether there is anything of a turn to learn."""
    return bool(content_of(message).strip() or reasoning_of(message).strip() or message.get("tool_calls"))
