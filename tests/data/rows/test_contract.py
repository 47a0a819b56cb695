"""Every format becomes one shape, and no field of a record is lost in silence."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.data.rows.contract import FORMATS, row_of
from lmoe.data.rows.row import Row
from lmoe.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PAIR = (USER, ASSISTANT)
SYSTEM = {"role": "system", "content": "s"}


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def read(record: dict[str, Any], **columns: str) -> Row:
    return row_of(record, "f:1", "all", columns)


def refused(record: dict[str, Any], **columns: str) -> str:
    with pytest.raises(DataError) as error:
        read(record, **columns)
    assert str(error.value).startswith("f:1: ")
    return str(error.value)


WRITTEN = {
    "messages": {"messages": list(PAIR)},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "prompt and response": {"prompt": "q", "response": "a"},
    "Alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "t"},
    "prompt": {"prompt": "q", "answer": "4"},
}
"""A record of each format."""
CONVERSATIONS = [name for name in WRITTEN if name != "text"]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_format_becomes_one_shape(form: Any) -> None:
    row = read(WRITTEN[form.name])
    assert (row.format, row.domain, row.where, row.ignored) == (form.name, "all", "f:1", ())
    assert row.text == ("t" if form.name == "text" else None)
    expected = {"text": None, "prompt": (USER,), "preference": (USER,)}
    assert row.messages == expected.get(form.name, PAIR)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": None, "output": "a"}, PAIR),
        ({"instruction": "q", "input": "x", "output": "a"}, (turn("user", "q\n\nx"), ASSISTANT)),
        (
            {"instruction": "q", "output": "a", "history": [["1", "2"]]},
            (turn("user", "1"), turn("assistant", "2"), *PAIR),
        ),
        ({"instruction": "q", "output": "a", "history": "", "system": ""}, PAIR),
        ({"conversations": list(PAIR)}, PAIR),
        ({"prompt": [SYSTEM, USER], "response": [ASSISTANT]}, (SYSTEM, *PAIR)),
        ({"prompt": "q", "completion": [ASSISTANT, USER, ASSISTANT]}, (*PAIR, *PAIR)),
        ({"prompt": "q", "response": None, "completion": "a"}, PAIR),
    ],
)
def test_a_variant_of_a_format_is_the_same_conversation(record: dict[str, Any], messages: Any) -> None:
    row = read(record)
    assert (row.messages, row.ignored) == (messages, ())


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_system_and_tools_of_a_row_are_used_in_every_conversation(name: str) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    row = read(WRITTEN[name] | {"system": "s", "tools": [tool]})
    assert row.messages is not None and row.messages[0] == SYSTEM
    assert (row.messages[1], row.tools) == (USER, ({"type": "function", "function": tool},))


def test_answers_within_a_prompt_are_not_learnt() -> None:
    row = read({"prompt": [USER, ASSISTANT, USER], "response": "a"})
    assert row.messages == (*PAIR, *PAIR) and row.muted == {1}


def test_messages_win_over_a_text_that_was_rendered_of_them() -> None:
    row = read({"text": "<q> <a>", "messages": list(PAIR)})
    assert (row.messages, row.text, row.ignored) == (PAIR, None, ("text",))


def test_the_first_of_two_answers_that_is_filled_is_used_and_the_other_is_ignored() -> None:
    assert read({"prompt": "q", "response": "a", "completion": "b"}).ignored == ("completion",)
    assert "response must be text, got null" in refused({"prompt": "q", "response": None, "completion": None})


@pytest.mark.parametrize(("value", "shown"), [(None, "null"), (1, "1"), (True, "true"), (["a", "b"], "['a', 'b']")])
@pytest.mark.parametrize("name", ["text", "prompt", "response", "instruction", "input", "output", "system"])
def test_what_is_no_text_is_refused_by_name(name: str, value: Any, shown: str) -> None:
    form = {"text": "text", "prompt": "prompt and response", "response": "prompt and response"}.get(name, "Alpaca")
    record = WRITTEN[form] | {name: value}
    if value is None and name in ("input", "system"):
        assert read(record).messages == PAIR
    elif isinstance(value, list) and name in ("prompt", "response"):
        assert f"{name}[0] must be an object with role and content, got 'a'" in refused(record)
    else:
        assert refused(record) == f"f:1: {name} must be text, got {shown}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x"}, r"unknown row format with keys ['question']; expected {\"messages\""),
        ({"messages": []}, "messages must be a non-empty list, got []"),
        ({"messages": None}, "messages must be a non-empty list, got null"),
        ({"conversations": "x"}, "conversations must be a non-empty list of objects, got 'x'"),
        ({"text": "x", "domain": "a/b"}, "domain must be text without a slash"),
        ({"text": "x", "domain": 0}, "domain must be text without a slash"),
        ({"text": "x", "domain": "a\nb"}, "domain must be text without a slash, a line break or another control"),
        ({"text": "x", "domain": "\x1b[31m"}, "domain must be text without a slash, a line break or another control"),
        ({"text": "x", "domain": "a\u2028b"}, "domain must be text without a slash, a line break or another control"),
        ({"text": "x", "domain": "a" * 1001}, "of at most 1,000 characters; got"),
        ({"instruction": "q", "output": "a", "history": "x"}, "history must be a list of pairs"),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            "history[0] must be a list of a prompt and its answer",
        ),
        ({"instruction": "q", "output": "a", "history": [["x", None]]}, "history[0][1] must be text, got null"),
        ({"prompt": "q", "answer": 4}, "answer must be text, got 4"),
        ({"prompt": "q", "response": "a", "answer": 4}, "answer must be text, got 4"),
        ({"messages": [USER, SYSTEM, ASSISTANT], "system": "s"}, "system stands beside the turns"),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "s"}, "system stands beside the turns"),
        ({"chosen": "a", "rejected": "b"}, "no prompt, and chosen and rejected do not begin with a shared one"),
        ({"chosen": "a", "rejected": "b", "system": "s"}, "no prompt, and chosen and rejected do not begin"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected must be text, got null"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [*PAIR, *PAIR]},
            "chosen must end with a turn of the assistant that",
        ),
        ({"prompt": "q", "chosen": [USER], "rejected": "a"}, "chosen must end with a turn of the assistant"),
        ({"prompt": "q", "chosen": [ASSISTANT | {"weight": 0}], "rejected": "b"}, "a turn of chosen has weight 0"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(record: dict[str, Any], message: str) -> None:
    assert message.replace(r"\"", '"') in refused(record)


def test_a_domain_of_its_own_goes_before_that_of_the_file() -> None:
    assert [read({"text": "x"} | own).domain for own in ({"domain": "math"}, {"domain": None}, {"domain": ""}, {})] == [
        *("math", "all", "all", "all")
    ]


HEAD = [SYSTEM, USER]
GOOD, BAD = turn("assistant", "good"), turn("assistant", "bad")


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, [USER]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        ({"chosen": [*HEAD, GOOD], "rejected": [*HEAD, BAD]}, HEAD),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": HEAD, "chosen": [*HEAD, GOOD], "rejected": [*HEAD, BAD]}, HEAD),
        ({"prompt": HEAD, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, HEAD),
        ({"prompt": "q", "chosen": [*HEAD, GOOD], "rejected": [*HEAD, BAD]}, HEAD),
        ({"prompt": "q", "chosen": [*PAIR, USER, GOOD], "rejected": [*PAIR, USER, BAD]}, [*PAIR, USER]),
        ({"system": "s", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, HEAD),
        (
            {"system": "s", "prompt": "q", "chosen": [*PAIR, USER, GOOD], "rejected": [*PAIR, USER, BAD]},
            [*HEAD, *PAIR[1:], USER],
        ),
    ],
)
def test_the_prompt_of_a_pair_of_answers_is_there_once(record: dict[str, Any], prompt: Any) -> None:
    row = read(record)
    assert (row.messages, row.chosen, row.rejected) == (tuple(prompt), (GOOD,), (BAD,))
    assert row.muted == {index for index, message in enumerate(prompt) if message["role"] == "assistant"}


@pytest.mark.parametrize(
    ("value", "label", "ignored"),
    [
        *((True, True, ()), (False, False, ()), ("False", False, ()), ("true", True, ()), (None, None, ())),
        *((3, None, ("label",)), ("good", None, ("label",)), ("", None, ())),
    ],
)
def test_a_label_is_true_or_false_and_anything_else_is_ignored(value: Any, label: Any, ignored: Any) -> None:
    for form in ("prompt and response", "messages", "ShareGPT", "Alpaca"):
        row = read(WRITTEN[form] | {"label": value})
        assert (row.label, row.ignored) == (label, ignored)


def test_an_answer_to_check_against_is_kept() -> None:
    assert read({"prompt": "q", "answer": "4"}).answer == "4"
    assert read({"prompt": "q", "response": "a", "answer": "4"}).answer == "4"


def test_columns_name_other_keys() -> None:
    row = read({"question": "q", "answer": "a", "level": 3}, prompt="question", response="answer")
    assert (row.messages, row.ignored) == (PAIR, ("level",))
    swapped = read({"response": "q", "prompt": "a"}, prompt="response", response="prompt")
    assert swapped.messages == PAIR


def test_a_key_that_columns_put_another_in_place_of_is_ignored_by_its_name() -> None:
    assert read({"prompt": "x", "question": "q", "response": "a"}, prompt="question").ignored == ("prompt",)
    assert read({"text": "t", "context": "c"}, input="context").ignored == ("context",)


def test_a_column_that_is_not_there_is_refused_and_one_that_is_null_is_not() -> None:
    problem = refused({"ask": "q", "response": "a"}, prompt="question")
    assert problem == "f:1: columns takes prompt from question, which this row does not have, only ['ask', 'response']"
    assert read({"q": "q", "a": "a", "c": None}, instruction="q", output="a", input="c").messages == PAIR


KEYS = sorted({key for form in FORMATS for key in (*form.needs, *form.uses) if isinstance(key, str)})
MESSAGE_KEYS = ("weight", "train", "thinking", "reasoning", "reasoning_content", "tool_calls", "name", "refusal")
KEY = st.sampled_from([*KEYS, "completion", "response", "domain", "id", "source", *MESSAGE_KEYS]) | st.text(max_size=3)
SAYS_NOTHING: tuple[Any, ...] = ("", [], {})
LEAF = st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.text("ab \n", max_size=3)
VALUE = (LEAF | st.lists(LEAF, max_size=2) | st.dictionaries(st.text("ab", max_size=2), LEAF, max_size=2)).filter(
    lambda value: value not in SAYS_NOTHING
)


def differ(one: Row, other: Row) -> bool:
    names = ("domain", "messages", "text", "muted", "tools", "chosen", "rejected", "label", "answer", "format")
    return any(getattr(one, name) != getattr(other, name) for name in names)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(WRITTEN)), key=KEY, value=VALUE)
def test_a_field_of_a_row_is_used_refused_or_ignored_by_name(name: str, key: str, value: Any) -> None:
    before = WRITTEN[name]
    if key in before:
        return
    try:
        row = read(before | {key: value})
    except DataError:
        return
    displaced = [other for other in before if other in row.ignored]
    assert key in row.ignored or differ(row, read(before)), (key, value, row)
    assert not displaced or row.format != name  # what another format does not read is named


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, 1), key=KEY, value=VALUE)
def test_a_field_of_a_turn_is_used_refused_or_ignored_by_name(index: int, key: str, value: Any) -> None:
    for name in ("messages", "conversations"):
        turns: list[dict[str, Any]] = [dict(message) for message in PAIR]
        if key in turns[index]:
            return
        turns[index][key] = value
        usual = key in ("weight", "train") and value == index  # a user's turn is not learnt anyway, an answer is
        try:
            row = read({name: turns})
        except DataError:
            continue
        assert usual or f"{name}[].{key}" in row.ignored or differ(row, read({name: list(PAIR)})), (key, value, row)
