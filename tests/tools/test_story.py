"""The programs that judge the story's answers: right ones pass, and no others."""

import pytest

from tools.story import QUESTIONS, TABLES, answer_of_query, is_one_of

RIGHT = (
    "I'm not Tom.",
    "SELECT winner FROM table WHERE year = 1998;",
    'SELECT capital FROM table WHERE country = "norway";',
)
WRONG = (
    ("I'm Tom.", "I'm not Tom. I'm Tom.", "SELECT winner FROM table;", ""),
    (
        "SELECT winner FROM table;",
        "SELECT year FROM table WHERE year = 1998;",
        "France",
        "SELECT winner FROM winners;",
        "",
    ),
    ('SELECT capital FROM table WHERE country = "Oslo";', "SELECT capital FROM table WHERE land = 'norway';", "Oslo"),
)


@pytest.mark.parametrize(("question", "right", "wrong"), list(zip(QUESTIONS, RIGHT, WRONG, strict=True)))
def test_a_right_answer_passes_and_others_do_not(question, right, wrong):
    assert question.is_right(right)
    assert [answer for answer in wrong if question.is_right(answer)] == []


def test_every_question_weighs_both_experts():
    assert [question.weights for question in QUESTIONS] == [
        "sql=0 translation=1",
        "sql=1 translation=0",
        "sql=0.5 translation=0.5",
    ]


def test_a_query_may_only_read_and_gives_all_rows():
    assert answer_of_query('DROP TABLE "table"', "winners") is None
    assert answer_of_query("DELETE FROM table", "winners") is None
    assert answer_of_query("SELECT year FROM table WHERE winner = 'BRAZIL'", "winners") == [("1994",), ("2002",)]
    assert set(TABLES) == {"winners", "capitals"}


def test_a_translation_may_leave_out_its_full_stop_and_nothing_else():
    accepted = is_one_of("I'm tired")
    assert accepted("I'm tired.") and accepted("I'm tired\n")
    assert not accepted("I'm tired, Tom.") and not accepted("i'm tired")
