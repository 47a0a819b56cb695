"""The assistant's turns are found by one rendering for all of them, and that finds what one for each finds."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.data.chats.spans import TurnFinder, squeezed
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.rows.row import Row
from tests.data.chats.templates import LLAMA2_STYLE, QWEN_STYLE, THINKING, WITHOUT_GENERATION

TOKENS = {"eos_token": "<|im_end|>"}
UNMARKED = {"chatml": WITHOUT_GENERATION, "qwen": QWEN_STYLE, "llama2": LLAMA2_STYLE, "thinking": THINKING}
WORDS = ("a", "ant", "user", "four", "assistant", " b", "\n", "\n\n", "x y", "Paris.", "é", "🙂", "好", "  ")
CONTENTS = st.lists(st.sampled_from(WORDS), max_size=3).map("".join)
CONVERSATIONS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4)


def row_of_pairs(pairs: Any) -> Row:
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]  # noqa: B905
    return Row(where="f:1", domain="", messages=tuple(turns))


def finder(template: ChatTemplate, row: Row, count: Callable[[], None] = lambda: None) -> tuple[TurnFinder, list[int]]:
    messages = list(row.messages or ())

    def render(some: Any, answer: bool) -> str:
        count()
        return template._run(some, "f:1", answer=answer)[0]

    speaking = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
    return TurnFinder(template._run(messages, "f:1")[0], messages, render), speaking


@pytest.mark.parametrize("name", UNMARKED)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(CONVERSATIONS)
def test_labelled_text_is_the_answers_with_their_ends_and_turns_found_at_once_are_those_found_alone(name, pairs):
    template = ChatTemplate(UNMARKED[name], TOKENS, ["<|im_end|>", "<|im_start|>"])
    rendered = template.render(row_of_pairs(pairs))
    learnt = [rendered.text[start:end] for start, end in rendered.spans]
    answers = [f"{answer.strip()}<|im_end|>" for _, answer in pairs if answer.strip()]
    if name == "thinking" and pairs[-1][1].strip():
        answers[-1] = f"<think></think>{answers[-1]}"
    assert list(map(squeezed, learnt)) == list(map(squeezed, answers))
    assert (rendered.turns, rendered.endless, rendered.shortened) == (len(answers), 0, 0)
    together, speaking = finder(template, row_of_pairs(pairs))
    alone = {index: together._alone(index) for index in speaking}
    assert together.places(speaking) == alone


@pytest.mark.parametrize("turns", [3, 60])
def test_a_long_conversation_is_rendered_as_often_as_a_short_one(turns: int) -> None:
    row = row_of_pairs([(f"What is {n}?", f"It is {n}.") for n in range(turns)])
    for source in (WITHOUT_GENERATION, LLAMA2_STYLE, THINKING):
        renderings = []
        found, speaking = finder(ChatTemplate(source, TOKENS, []), row, lambda seen=renderings: seen.append(1))
        assert len(found.places(speaking)) == turns
        assert len(renderings) == 1


def test_one_turn_that_differs_costs_two_more_renderings() -> None:
    pairs = [(f"What is {n}?", f"<think>\nhm {n}\n</think>\n\nIt is {n}.") for n in range(30)]
    renderings: list[int] = []
    found, speaking = finder(ChatTemplate(QWEN_STYLE, TOKENS, []), row_of_pairs(pairs), lambda: renderings.append(1))
    places = found.places(speaking)
    assert len(renderings) == 3, "the last turn alone shows its thoughts"
    assert found.text[slice(*places[1])] == "It is 0."
    assert found.text[slice(*places[59])] == "<think>\nhm 29\n</think>\n\nIt is 29."


def test_places_that_can_be_read_in_two_ways_are_looked_for_one_by_one() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", {}, [])
    answers = ("b\nb", "b", "b\nb\nb")
    row = Row(where="f:1", domain="", messages=tuple({"role": "assistant", "content": text} for text in answers))
    found, speaking = finder(template, row)
    assert [found.text[slice(*place)] for place in found.places(speaking).values()] == list(answers)
