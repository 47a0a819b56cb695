"""Turns of a conversation, as data sets write them, brought to the shape that chat templates take."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmoe.data.rows.row import Message
from lmoe.errors import DataError, LmoeError
from lmoe.files.small_file import Reader
from lmoe.files.wording import quoted, shown

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
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that say as little as its absence."""
JSON_TEXT = Reader(error=DataError, finite=False, keys_once=True)
"""How a text that holds JSON is parsed."""
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
            raise DataError(f"{where}: {name} must be a non-empty list, got {in_row(turns)}")
        for index, turn in enumerate(turns):
            self._add_message(turn, f"{name}[{index}]", name, where, muted=muted)

    def add_sharegpt(self, turns: Any, name: str, where: str) -> None:
        """Add a list of turns with `from` and `value`, or of messages.

        Raises:
            DataError: as `add_all`.
        """
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: {name} must be a non-empty list of objects, got {in_row(turns)}")
        if not any("from" in turn for turn in turns):
            return self.add_all(turns, name, where)
        for index, turn in enumerate(turns):
            place = f"{name}[{index}]"
            speaker, value = turn.get("from"), turn.get("value")
            role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
            if role is None:
                raise DataError(f"{where}: {place}.from is {in_row(speaker)}; allowed: {', '.join(SPEAKERS)}")
            own = {"role": role, "content": value}
            if role == "function_call":
                call = text_of(value, f"{place}.value", where)
                own = {"role": "assistant", "tool_calls": _parsed(call, f"{place}.value", where)}
            rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
            self.ignored |= {f"{name}[].{key}" for key in own if rest.get(key) is not None}
            self._add_message(rest | own, place, name, where, content_key="value")
        return None

    def _add_message(
        self, turn: Any, place: str, name: str, where: str, *, muted: bool = False, content_key: str = "content"
    ) -> None:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {place} must be an object with role and content, got {in_row(turn)}")
        role = turn.get("role")
        if role not in ROLES:
            raise DataError(f"{where}: {place}.role is {in_row(role)}; allowed: {', '.join(ROLES)}")
        given = {key: value for key, value in turn.items() if value is not None}
        message: Message = {"role": role, "content": ""}
        calls = given.get("tool_calls")
        if calls not in NOTHING and (calls := _parsed(calls, f"{place}.tool_calls", where)):
            if role != "assistant":
                raise DataError(f"{where}: {place}.tool_calls: only the assistant calls tools, this is {role}")
            message["tool_calls"] = [
                self._tool_call(call, f"{place}.tool_calls[{index}]", f"{name}[].tool_calls[]", where)
                for index, call in enumerate(calls)
            ]
        if "content" not in turn and "tool_calls" not in message:
            raise DataError(f"{where}: {place} has no content, only {in_row(sorted(map(str, turn)))}")
        if "content" in given or "tool_calls" not in message:
            message["content"] = self._content(
                turn.get("content"), f"{place}.{content_key}", f"{name}[].{content_key}", where
            )
        for key in REASONING:
            if given.get(key) not in NOTHING:
                if role != "assistant":
                    raise DataError(f"{where}: {place}.{key}: only the assistant reasons, this is {role}")
                thoughts = text_of(given[key], f"{place}.{key}", where)
                if message.setdefault("reasoning_content", thoughts) != thoughts:
                    self.ignored.add(f"{name}[].{key}")
        message |= {key: text_of(given[key], f"{place}.{key}", where) for key in PASSED_ON if key in given}
        own_mute = _is_muted(given, role, place, where)
        if own_mute or (muted and role == "assistant"):
            self.muted.add(len(self.messages))
        if muted and own_mute is False:
            self.ignored |= {f"{name}[].{key}" for key in ("weight", "train") if key in given}
        for key in OTHER_CONTENT:
            if given.get(key) not in NOTHING:
                hint = "write it as tool_calls" if key == "function_call" else "rows hold text only"
                raise DataError(f"{where}: {place}.{key} cannot be learnt; {hint}")
        read = {"role", "content", "tool_calls", "weight", "train", *REASONING, *PASSED_ON, *OTHER_CONTENT}
        self.ignored |= {f"{name}[].{key}" for key in given if key not in read}
        self.messages.append(message)

    def _content(self, value: Any, place: str, name: str, where: str) -> str:
        """Text, or content parts that are all text, joined."""
        if not isinstance(value, list):
            return text_of(value, place, where)
        texts = []
        for index, part in enumerate(value):
            kind = part.get("type", "text") if isinstance(part, dict) else None
            if kind != "text":
                what = f"of type {in_row(kind)}" if isinstance(part, dict) else in_row(part)
                raise DataError(
                    f'{where}: {place}[{index}] is {what}; a content part must be {{"type": "text", "text": …}}'
                )
            texts.append(text_of(part.get("text"), f"{place}[{index}].text", where))
            self._ignore(part, ("type", "text"), f"{name}[]")
        return "".join(texts)

    def _tool_call(self, call: Any, place: str, name: str, where: str) -> dict[str, Any]:
        """A call with its arguments as an object, which is what templates write as JSON."""
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where}: {place} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}, '
                f"got {in_row(call)}"
            )
        arguments = _arguments(function.get("arguments", {}), f"{place}.function.arguments", where)
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        kind = ("type",) if call.get("type") == "function" else ()
        self._ignore(call, (*kind, "function", *identity, *(("name", "arguments") if function is call else ())), name)
        if function is not call:
            self._ignore(function, ("name", "arguments"), f"{name}.function")
        return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}

    def _ignore(self, value: dict[str, Any], read: Sequence[str], name: str) -> None:
        """Note the fields of an object that are not read."""
        self.ignored |= {f"{name}.{key}" for key, item in value.items() if key not in read and item is not None}


def _is_muted(given: dict[str, Any], role: str, place: str, where: str) -> bool | None:
    """Whether an assistant's turn takes its label away by its own `weight` or `train`; None where it does not say."""
    weight, train = given.get("weight"), given.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{where}: {place}.weight is {in_row(weight)}; allowed: 0 (the turn is not learnt) and 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: {place}.train is {in_row(train)}; allowed: true and false")
    if weight is not None and train is not None and bool(weight) != train:
        raise DataError(f"{where}: {place} has weight {weight} and train {in_row(train)}, which contradict each other")
    learns = train if weight is None else bool(weight)
    if learns and role != "assistant":
        key = "weight" if train is None else "train"
        raise DataError(
            f"{where}: {place}.{key}: a turn of {role} cannot be learnt on its own; data.train_on=all learns all turns"
        )
    return None if learns is None or role != "assistant" else not learns


def in_row(value: Any) -> str:
    """A value of a row as JSON writes it where that is short, for messages."""
    return shown(value) if value is None or isinstance(value, bool) else quoted(value)


def text_of(value: Any, name: str, where: str) -> str:
    """A field that must be text.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):
        return value
    raise DataError(f"{where}: {name} must be text, got {in_row(value)}")


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """Functions that may be called, from a list of them or from its JSON text; None where there are none.

    Raises:
        DataError: something else.
    """
    tools = [] if value in NOTHING else _parsed(value, "tools", where)
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where}: tools[{index}] must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}, '
                f"got {in_row(tool)}"
            )
        _check_json(tool, f"tools[{index}]", where)
    whole = ({"type": "function", **(tool if "function" in tool else {"function": tool})} for tool in tools)
    return tuple(whole) or None


def _parsed(value: Any, name: str, where: str) -> list[Any]:
    """A list, or JSON text of one or of an object alone."""
    found = _of_json(value, name, "a list or its JSON text", where)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise DataError(f"{where}: {name} must be a list or its JSON text, got {in_row(value)}")
    return found


def _of_json(value: Any, name: str, what: str, where: str) -> Any:
    """A value, or what its JSON text holds."""
    if not isinstance(value, str):
        return value
    try:
        return JSON_TEXT.parsed(value, "")
    except LmoeError as error:
        reason = str(error).removeprefix(": ")
        raise DataError(f"{where}: {name} must be {what}, got {in_row(value)} ({reason})") from None


def _arguments(value: Any, name: str, where: str) -> dict[str, Any]:
    found = {} if value is None or value == "" else _of_json(value, name, "an object or its JSON text", where)
    if not isinstance(found, dict):
        raise DataError(f"{where}: {name} must be an object or its JSON text, got {in_row(value)}")
    _check_json(found, name, where)
    return found


def _check_json(value: Any, name: str, where: str) -> None:
    """Refuse what a template cannot write as JSON: a date of a table, and a number that is none or endless."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} cannot be written as JSON, got {in_row(value)} ({error})") from None
