"""Turns as OpenAI and ShareGPT write them, brought to the shape of chat templates."""

import json
from datetime import datetime
from typing import Any

import pytest

from lmoe.data.rows.contract import row_of
from lmoe.data.rows.row import Row
from lmoe.errors import DataError

USER = {"role": "user", "content": "q"}


def read(*turns: Any, name: str = "messages", **fields: Any) -> Row:
    return row_of({name: list(turns), **fields}, "f:1", "all")


def answer(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **fields}


def read_answer(**fields: Any) -> dict[str, Any]:
    """The answer as a template gets it."""
    row = read(USER, answer(**fields))
    assert row.messages is not None and row.ignored == ()
    return row.messages[1]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
TEXT = json.dumps({"city": "Oslo"})


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        json.dumps(CALL),
        [{"function": {"name": "f", "arguments": TEXT}}],
        [{"name": "f", "arguments": TEXT}],
        [{"name": "f", "arguments": {"city": "Oslo"}}],
    ],
)
def test_calls_of_tools_come_as_objects_however_they_are_written(calls: Any) -> None:
    assert read_answer(content=None, tool_calls=calls) == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    [call] = read_answer(tool_calls=[{"id": "c1", "name": "f", "arguments": arguments}])["tool_calls"]
    assert call == {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("calls", [None, [], "", "[]"])
def test_an_answer_without_calls_has_no_such_field(calls: Any) -> None:
    assert read_answer(tool_calls=calls) == {"role": "assistant", "content": "a"}


TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
WHOLE_TOOL = {"type": "function", "function": TOOL}


@pytest.mark.parametrize(
    "tools", [[WHOLE_TOOL], [TOOL], [{"function": TOOL}], json.dumps([TOOL]), json.dumps(WHOLE_TOOL)]
)
def test_tools_come_whole_however_they_are_written(tools: Any) -> None:
    assert read(USER, answer(), tools=tools).tools == (WHOLE_TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert read(USER, answer(), tools=tools).tools is None


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_one_name(key: str) -> None:
    assert read_answer(**{key: "hm"})["reasoning_content"] == "hm"


def test_the_first_of_two_thoughts_is_kept_and_the_other_named() -> None:
    row = read(USER, answer(thinking="b", reasoning_content="a", reasoning="a"))
    assert row.messages is not None and row.messages[1]["reasoning_content"] == "a"
    assert row.ignored == ("messages[].thinking",)


def test_parts_of_a_content_that_are_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}]
    assert read_answer(content=parts)["content"] == "ab"
    row = read(USER, answer(content=[{"type": "text", "text": "a", "annotations": [1]}]))
    assert row.ignored == ("messages[].content[].annotations",)


def test_what_is_within_a_call_and_not_read_is_named() -> None:
    call = {"index": 0, "id": 7, "function": {"name": "f", "arguments": {}, "strict": True}}
    names = ("id", "index", "function.strict")
    assert read(USER, answer(tool_calls=[call])).ignored == tuple(
        sorted(f"messages[].tool_calls[].{name}" for name in names)
    )
    custom = read(USER, answer(tool_calls=[{"type": "custom", "name": "f", "arguments": {}}]))
    assert custom.ignored == ("messages[].tool_calls[].type",)


NO_JSON = [datetime(2026, 1, 31), b"x", float("nan"), float("inf"), [{"deep": float("-inf")}]]


@pytest.mark.parametrize("value", NO_JSON, ids=repr)
def test_what_json_cannot_write_is_refused_in_calls_and_tools(value: Any) -> None:
    with pytest.raises(
        DataError, match=r"f:1: messages\[1\].tool_calls\[0\].function.arguments cannot be written as JSON"
    ):
        read(USER, answer(tool_calls=[{"name": "f", "arguments": {"a": value}}]))
    with pytest.raises(DataError, match=r"f:1: tools\[0\] cannot be written as JSON"):
        read(USER, answer(), tools=[{"name": "f", "parameters": {"default": value}}])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_a_number_that_is_none_or_endless_is_refused_in_the_text_of_arguments(number: str) -> None:
    with pytest.raises(DataError, match="function.arguments cannot be written as JSON"):
        read(USER, answer(tool_calls=[{"name": "f", "arguments": f'{{"a": {number}}}'}]))


def test_roles_names_and_results_of_tools_are_passed_on() -> None:
    turns = (
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    )
    assert read(*turns, answer()).messages == (*turns, answer())


@pytest.mark.parametrize(("mute", "muted"), [({"weight": 0}, {1}), ({"train": False}, {1}), ({"weight": 1.0}, set())])
def test_a_turn_of_weight_0_is_muted(mute: dict[str, Any], muted: set[int]) -> None:
    assert read(USER, answer(**mute), USER, answer()).muted == muted


def test_a_weight_within_a_prompt_is_named_as_ignored() -> None:
    row = row_of({"prompt": [USER, answer(weight=1), USER], "response": "a"}, "f:1", "all")
    assert (row.muted, row.ignored) == ({1}, ("prompt[].weight",))


def test_sharegpt_becomes_messages() -> None:
    call = json.dumps({"name": "f", "arguments": {"city": "Oslo"}})
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "a", "weight": 0},
    ]
    row = read(*turns, name="conversations")
    assert row.messages == (
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "a"},
    )
    assert (row.muted, row.format) == ({4}, "ShareGPT")


def test_a_turn_written_both_ways_is_read_as_sharegpt_and_the_rest_is_named() -> None:
    turns = [{"from": "human", "value": "q", "role": "assistant", "content": "x"}, {"from": "gpt", "value": "a"}]
    row = read(*turns, name="conversations")
    assert row.messages == (USER, answer()) and row.ignored == ("conversations[].content", "conversations[].role")


REFUSED = [
    ("x", "messages[0] must be an object with role and content, got 'x'"),
    ({"content": "x"}, "messages[0].role is null; allowed: system, developer, user, assistant, tool"),
    ({"role": "bot", "content": "x"}, "messages[0].role is 'bot'; allowed"),
    ({"role": ["user"], "content": "x"}, "messages[0].role is ['user']; allowed"),
    ({"role": "user"}, "messages[0] has no content, only ['role']"),
    ({"role": "user", "content": None}, "messages[0].content must be text, got null"),
    ({"role": "user", "content": 3}, "messages[0].content must be text, got 3"),
    ({"role": "user", "content": {"a": 1}}, "messages[0].content must be text, got {'a': 1}"),
    ({"role": "user", "content": ["a"]}, "messages[0].content[0] is 'a'; a content part must be"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0] is of type 'image_url'"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text must be text, got null"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls: only the assistant calls tools"),
    ({"role": "user", "content": "x", "thinking": "hm"}, "messages[0].thinking: only the assistant reasons"),
    ({"role": "user", "content": "x", "name": 3}, "messages[0].name must be text, got 3"),
    (answer(thinking=["hm"]), "messages[0].thinking must be text, got ['hm']"),
    (answer(tool_calls=["f"]), "messages[0].tool_calls[0] must be {"),
    (answer(tool_calls="f("), "messages[0].tool_calls must be a list or its JSON text, got 'f('"),
    (answer(tool_calls=3), "messages[0].tool_calls must be a list or its JSON text, got 3"),
    (answer(tool_calls=[{"name": "f", "arguments": "{"}]), "tool_calls[0].function.arguments must be an object or its"),
    (answer(tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments must be an object or its JSON text, got '[1]'"),
    (answer(tool_calls=[{"name": "f", "arguments": '{"a": "\\ud800"}'}]), "half of a surrogate pair"),
    (answer(tool_calls="[" * 200 + "]" * 200), "nested more than 100 deep"),
    (answer(weight=0.5), "messages[0].weight is 0.5; allowed: 0 (the turn is not learnt) and 1"),
    (answer(weight=True), "messages[0].weight is true; allowed"),
    (answer(train=1), "messages[0].train is 1; allowed: true and false"),
    (answer(train=True, weight=0), "messages[0] has weight 0 and train true, which contradict each other"),
    ({"role": "user", "content": "x", "train": True}, "messages[0].train: a turn of user cannot be learnt on its own"),
    (answer(function_call={"name": "f"}), "messages[0].function_call cannot be learnt; write it as tool_calls"),
    (answer(images=["x.png"]), "messages[0].images cannot be learnt; rows hold text only"),
]


@pytest.mark.parametrize(("turn", "message"), REFUSED)
def test_a_turn_that_cannot_be_read_is_refused_by_file_line_and_place(turn: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(turn)
    assert str(error.value).startswith("f:1: ") and message in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "alien", "value": "x"}, "conversations[0].from is 'alien'; allowed: human, user"),
        ({"from": None, "value": "x"}, "conversations[0].from is null; allowed"),
        ({"from": "human"}, "conversations[0].value must be text, got null"),
        ({"from": "human", "value": 3}, "conversations[0].value must be text, got 3"),
        (
            {"from": "function_call", "value": "f()"},
            "conversations[0].value must be a list or its JSON text, got 'f()'",
        ),
    ],
)
def test_a_turn_of_sharegpt_is_refused_by_the_names_it_has(turn: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(turn, name="conversations")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tools", "message"), [("{", "tools must be a list"), (3, "tools must be"), ([{}], "tools[0]")]
)
def test_tools_that_cannot_be_read_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(USER, answer(), tools=tools)
    assert message in str(error.value)
