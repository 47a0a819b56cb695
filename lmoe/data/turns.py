"""Turns of a conversation, as data sets write them, brought to the shape that chat templates take."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmoe.data.row import Message
from lmoe.errors import DataError
from lmoe.files.wording import quoted

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    "system": "system",
    "developer": "developer",
}
"""What ShareGPT's `from` stands for."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thinks before it answers; templates read the first, or the second."""
PASSED_ON = ("name", "tool_call_id")
OTHER_CONTENT = ("function_call", "audio", "image", "images", "video", "videos", "refusal")
"""Fields of a message that say something which a text cannot show."""


@dataclass(slots=True)
class Turns:
    """A conversation under way.

    Args:
        messages: turns so far.
        muted: indices of the assistant's turns that carry no label.
        ignored: fields that nothing is made of.
    """

    messages: list[Message] = field(default_factory=list)
    muted: set[int] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)

    def add(self, role: str, content: str, *, muted: bool = False) -> None:
        """Add a turn of text."""
        if muted:
            self.muted.add(len(self.messages))
        self.messages.append({"role": role, "content": content})

    def add_all(self, turns: Any, name: str, where: str, *, muted: bool = False) -> None:
        """Add a list of turns as OpenAI writes them.

        Args:
            name: of the field, for messages.
            muted: the assistant's turns carry no label.

        Raises:
            DataError: no list, an empty one, or a turn that is none.
        """
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: {name} must be a non-empty list, got {quoted(turns)}")
        for index, turn in enumerate(turns):
            self._add_message(turn, f"{name}[{index}]", name, where, muted=muted)

    def add_sharegpt(self, turns: Any, name: str, where: str) -> None:
        """Add a list of turns with `from` and `value`, or of messages.

        Raises:
            DataError: as `add_all`.
        """
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: {name} must be a non-empty list of objects, got {quoted(turns)}")
        if not any("from" in turn for turn in turns):
            return self.add_all(turns, name, where)
        for index, turn in enumerate(turns):
            place = f"{name}[{index}]"
            speaker, value = turn.get("from"), turn.get("value")
            role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
            if role is None:
                raise DataError(f"{where}: {place}.from is {quoted(speaker)}; allowed: {', '.join(SPEAKERS)}")
            rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
            if role == "function_call":
                call = text_of(value, f"{place}.value", where)
                self._add_message(
                    {"role": "assistant", "tool_calls": _parsed(call, f"{place}.value", where), **rest},
                    *(place, name, where),
                )
            else:
                self._add_message({"role": role, "content": value, **rest}, place, name, where)
        return None

    def _add_message(self, turn: Any, place: str, name: str, where: str, *, muted: bool = False) -> None:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {place} must be an object with role and content, got {quoted(turn)}")
        role = turn.get("role")
        if role not in ROLES:
            raise DataError(f"{where}: {place}.role is {quoted(role)}; allowed: {', '.join(ROLES)}")
        given = {key: value for key, value in turn.items() if value is not None}
        message: Message = {"role": role, "content": ""}
        calls = given.pop("tool_calls", None)
        if calls not in (None, []):
            if role != "assistant":
                raise DataError(f"{where}: {place}.tool_calls: only the assistant calls tools, this is {role}")
            message["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls", where)
        if "content" not in turn and "tool_calls" not in message:
            raise DataError(f"{where}: {place} has no content, only {quoted(sorted(map(str, turn)))}")
        if "content" in given or "tool_calls" not in message:
            message["content"] = _content(turn.get("content"), f"{place}.content", where)
        for key in REASONING:
            if given.get(key):
                if role != "assistant":
                    raise DataError(f"{where}: {place}.{key}: only the assistant reasons, this is {role}")
                message.setdefault("reasoning_content", text_of(given[key], f"{place}.{key}", where))
        message |= {key: text_of(given[key], f"{place}.{key}", where) for key in PASSED_ON if key in given}
        if _is_muted(given, role, place, where) or (muted and role == "assistant"):
            self.muted.add(len(self.messages))
        for key in OTHER_CONTENT:
            if given.get(key) not in (None, [], {}, ""):
                hint = "write it as tool_calls" if key == "function_call" else "rows hold text only"
                raise DataError(f"{where}: {place}.{key} cannot be learnt; {hint}")
        read = {"role", "content", "tool_calls", "weight", "train", *REASONING, *PASSED_ON, *OTHER_CONTENT}
        self.ignored |= {f"{name}[].{key}" for key in given if key not in read}
        self.messages.append(message)


def _is_muted(given: dict[str, Any], role: str, place: str, where: str) -> bool:
    """Whether a turn's own `weight` or `train` takes its label away."""
    weight, train = given.get("weight"), given.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{where}: {place}.weight is {quoted(weight)}; allowed: 0 (the turn is not learnt) and 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: {place}.train is {quoted(train)}; allowed: true and false")
    if weight is not None and train is not None and bool(weight) != train:
        raise DataError(f"{where}: {place} has weight {weight} and train {quoted(train)}, which say the opposite")
    learns = train if weight is None else bool(weight)
    if learns and role != "assistant":
        key = "weight" if train is None else "train"
        raise DataError(
            f"{where}: {place}.{key}: a turn of {role} cannot be learnt on its own; data.train_on=all learns all turns"
        )
    return learns is False and role == "assistant"


def text_of(value: Any, name: str, where: str) -> str:
    """A field that must be text.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):
        return value
    raise DataError(f"{where}: {name} must be text, got {'null' if value is None else quoted(value)}")


def _content(value: Any, name: str, where: str) -> str:
    """Text, or content parts that are all text, joined."""
    if not isinstance(value, list):
        return text_of(value, name, where)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            what = f"of type {quoted(kind)}" if isinstance(part, dict) else quoted(part)
            raise DataError(f'{where}: {name}[{index}] is {what}; a content part must be {{"type": "text", "text": …}}')
        texts.append(text_of(part.get("text"), f"{name}[{index}].text", where))
    return "".join(texts)


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """Functions that may be called, from a list of them or from its JSON text; None where there are none.

    Raises:
        DataError: something else.
    """
    if value in (None, "", []):
        return None
    tools = _parsed(value, "tools", where)
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where}: tools[{index}] must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}, '
                f"got {quoted(tool)}"
            )
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _parsed(value: Any, name: str, where: str) -> list[Any]:
    """A list, or JSON text of one or of an object alone."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {name} must be JSON of a list, got {quoted(value)}") from None
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list, got {quoted(value)}")
    return value


def _tool_calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, which is what templates write as JSON."""
    calls = []
    for index, call in enumerate(_parsed(value, name, where)):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where}: {name}[{index}] must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}, '
                f"got {quoted(call)}"
            )
        arguments = _arguments(function.get("arguments", {}), f"{name}[{index}].function.arguments", where)
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _arguments(value: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {name} must be an object or its JSON text, got {quoted(value)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: {name} must be an object or its JSON text, got {quoted(value)}")
    return value


def last_assistant(messages: Sequence[Message]) -> int | None:
    """Index of the assistant's last turn, or None."""
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None)
