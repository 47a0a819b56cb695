"""What may be set of a chat template."""

import pytest

from lmoe.rules.template import template_problems


@pytest.mark.parametrize("value", [None, True, 2, -0.5, "text", [1, ["a"]], {"a": {"b": None}}])
def test_plain_values_may_be_set(value: object) -> None:
    assert template_problems({"enable_thinking": value}, "2026-01-31") == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("messages", 1, "has its own messages"),
        ("bos_token", "x", "has its own bos_token"),
        ("strftime_now", "x", "data.template_date"),
        ("a b", 1, "no name of a variable"),
        ("None", 1, "no name of a variable"),
        ("x", float("nan"), "the number nan"),
        ("x", [{1: 2}], "the name 1"),
        ("x", b"a", "a bytes"),
    ],
)
def test_other_names_and_values_are_refused_by_key(name: str, value: object, said: str) -> None:
    [problem] = template_problems({name: value}, None)
    assert problem.startswith(f"data.template_kwargs.{name}") and said in problem


@pytest.mark.parametrize("day", ["today", "2026-1-31", "2026-02-30", "20260131"])
def test_a_day_is_written_as_year_month_day(day: str) -> None:
    [problem] = template_problems({}, day)
    assert problem == f"data.template_date is {day}, must be a day such as 2026-01-31"
