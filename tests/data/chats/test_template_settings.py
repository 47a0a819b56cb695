"""Variables that are written into a chat template, and what a template reads."""

import pytest

from lmoe.data.chats.render_limit import render
from lmoe.data.chats.template_settings import reads_clock, variables_of, with_settings
from lmoe.errors import DataError
from tests.data.chats.templates import DATED, THINKING

READS = (
    "  {%- if flag is defined and flag %}yes{% endif %}\n\n{% for m in messages %}\n  {{ m.content }} {{ flag }} "
    "{{ text }} {{ many }}\n{% endfor %}{% macro f() %}[{{ text }}]{% endmacro %}{{ f() }}\n"
)
VALUES = {"flag": False, "text": "a\"b'\n🙂 {% x %} }} \\ é", "many": {"a": [1, -2.5, None, True, 1e-7], "b": "x"}}
MESSAGES = {"messages": [{"content": "x"}]}


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  {# c #}\n", "{{- 'a' -}}", "{%- set b = 1 %}\n"])
def test_a_template_with_settings_renders_as_with_the_variables_passed(start: str) -> None:
    source = start + READS
    fixed = with_settings(source, VALUES)
    assert render(fixed, MESSAGES) == render(source, MESSAGES | VALUES)
    assert with_settings(fixed, VALUES) == fixed


def test_who_renders_with_a_value_gets_that_value() -> None:
    passed = MESSAGES | VALUES | {"flag": True}
    assert render(with_settings(READS, VALUES), MESSAGES | {"flag": True}) == render(READS, passed)


def test_a_variable_that_the_template_does_not_read_is_refused_with_those_that_it_reads() -> None:
    with pytest.raises(DataError, match=r"data\.template_kwargs\.thinking: .* reads enable_thinking"):
        with_settings(THINKING, {"thinking": False})
    with pytest.raises(DataError, match="reads no variable that could be set"):
        with_settings(DATED, {"thinking": False})


def test_what_a_template_makes_itself_it_does_not_read() -> None:
    assert variables_of("{% set a = 1 %}{{ a }}{% for b in c %}{{ b }}{% endfor %}") == {"c"}
    assert variables_of("{% if %}") == frozenset()
    assert reads_clock(DATED) and not reads_clock(THINKING) and not reads_clock(None)
