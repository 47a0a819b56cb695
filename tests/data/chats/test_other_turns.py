"""Places of what others than the assistant say."""

import pytest

from lmoe.data.chats.other_turns import other_contents
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.chats.turn_labels import AnswerPrompt, joined
from lmoe.data.rows.row import Message

SAID = ("one", ' "two"\n', "one")
MESSAGES: list[Message] = [
    {"role": role, "content": text}
    for role, text in zip(("user", "assistant", "tool", "assistant", "user"), (SAID[0], "one", SAID[1], "x", SAID[2]))  # noqa: B905
]
LINES = "{% for m in messages %}{{ WRITTEN + '\n' }}{% endfor %}"


def found(written: str) -> tuple[list[str], list[str]]:
    """The texts at the places that are found, and contents without a place."""
    template = ChatTemplate(LINES.replace("WRITTEN", written), {}, [])
    text = template._run(MESSAGES, "")[0]
    others = other_contents(text, MESSAGES, lambda messages, answer: template._run(messages, "", answer=answer)[0])
    return [text[start:end] for start, end in others.places], list(others.unplaced)


@pytest.mark.parametrize(
    ("written", "places"),
    [
        ("m.content", ["one", '"two"', "one"]),
        ("m.content.strip()", ["one", '"two"', "one"]),
        ("(m.content | tojson)", ["one", '\\"two\\"', "one"]),
        ("m.content + m.content", ["one", "one", '"two"', '"two"', "one", "one"]),
        ("('said ' if m.content.startswith('o') else 'asked ') + m.content", ["one", '"two"', "one"]),
    ],
)
def test_contents_are_found_however_a_template_writes_them(written: str, places: list[str]) -> None:
    assert found(written) == (places, [])


def test_contents_that_a_template_leaves_out_have_no_place() -> None:
    assert found("'-'") == ([], [])


def test_contents_whose_place_is_not_known_are_named() -> None:
    assert found("m.content + (m.content | length | string)") == ([], ["one", '"two"', "one"])


def test_spans_that_touch_are_joined() -> None:
    assert joined([(1, 2), (2, 4), (5, 6), (6, 6)]) == [(1, 4), (5, 6)]


@pytest.mark.parametrize(
    ("asking", "answered", "expected"),
    [
        ("q<a>", "q<a>yes.", ("<a>", "<a>", False)),
        ("q<a>", "q<a>\n<t></t>yes.", ("<a>", "<a>", True)),
        ("q<a><t>\n", "q<a><t></t>yes.", ("<a><t>\n", "<a><t>", True)),
        ("q<a>", "elsewhere", ("<a>", "<a>", False)),
        ("elsewhere", "q<a>yes.", ("", "", False)),
    ],
)
def test_the_prompt_is_what_stands_behind_the_question_and_its_head_begins_the_answer(asking, answered, expected):
    prompt = AnswerPrompt.of("q", asking, answered, "yes.")
    assert (prompt.text, prompt.head, prompt.goes_on) == expected
