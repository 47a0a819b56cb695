"""Templates of strangers: they render as in Transformers, and they come to an end."""

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lmoe.data.chats import render_limit
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.rows.row import Row
from lmoe.errors import DataError
from lmoe.pretrain.bpe import CHAT_TEMPLATE
from tests.data.chats.templates import LLAMA2_STYLE, QWEN_STYLE, WITHOUT_GENERATION

MESSAGES = [
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]
FEATURES = """\
{%- macro turn(m, n=2) -%}{{ ('%s:' % m.role) ~ m.content | trim ~ '.' * n }}{%- endmacro -%}
{%- set ns = namespace(count=0, text='') -%}
{%- for m in messages if m.content != 'and?' -%}
{%- set ns.count = ns.count + 1 -%}{%- set ns.text = ns.text ~ loop.index ~ ('!' if loop.last else ',') -%}
{{ turn(m) }}{% if loop.index > 3 %}{% break %}{% endif %}
{%- else -%}none{%- endfor -%}
{%- macro twice() -%}{{ caller(1) }}{{ caller(2) }}{%- endmacro -%}{% call(x) twice() %}{{ x }}{% endcall %}
{% set block %}{{ ns.text }}{% endset %}{{ block | upper }} {{ 2 ** 5 }} {{ 7 % 4 }} {{ [1, 2] + [3] }} {{ 3 * 'ab' }}
{{ messages | map(attribute='role') | unique | join(', ') }} {{ messages | length }} {{ 'x'.center(9) }}
{{ messages[0] | tojson(indent=1) }} {{ "{:>5}|{}".format('a', 10 ** 9) }} {{ 1 ~ none ~ true }} {{ eos }}
"""


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize(
    "source",
    [CHAT_TEMPLATE, WITHOUT_GENERATION, QWEN_STYLE, LLAMA2_STYLE, FEATURES],
    ids=["generation", "plain", "qwen", "llama2", "features"],
)
def test_text_and_marks_are_those_of_transformers(source, answer):
    special = {"eos": "</s>", "bos_token": "<s>", "eos_token": "</s>"}
    marked = ChatTemplate(source, {}, []).has_generation
    (text,), spans = render_jinja_template(
        [MESSAGES],
        chat_template=source,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=answer,
        **special,
    )
    given = {**special, "messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": answer}
    if marked:
        assert render_limit.render_with_generation(source, given) == (text, [tuple(span) for span in spans[0]])
        assert spans[0]
    else:
        assert render_limit.render(source, given) == text


R = "range(100000)"
ENDLESS = {
    "nested loops": f"{{% for a in {R} %}}{{% for b in {R} %}}{{% endfor %}}{{% endfor %}}",
    "a loop whose test fails": f"{{% for a in {R} %}}{{% for b in {R} if b < 0 %}}{{% endfor %}}{{% endfor %}}",
    "a loop that calls itself": (
        "{% for a in [60] recursive %}{% if a %}{{ loop([a - 1]) }}{{ loop([a - 1]) }}{% endif %}{% endfor %}"
    ),
    "filters in a loop": f"{{% for a in {R} %}}{{% set x = {R} | list | sort | sum %}}{{% endfor %}}",
    "a macro that calls itself": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
}
LARGE = {
    "a product": "{{ 'a' * 10 ** 9 }}",
    "a product of lists": "{{ [0] * 10 ** 9 }}",
    "a power": "{{ 10 ** 10000000000 }}",
    "doubled by +": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled by ~": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "squared": "{% set n = namespace(i=9) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}",
    "a width": "{{ 'a'.ljust(10 ** 9) }}",
    "a width of a filter": "{{ 'a' | center(10 ** 9) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a computed format": "{{ '%*d' % (10 ** 9, 1) }}",
    "a format in braces": "{{ '{:>1000000000}'.format(1) }}",
    "a computed format in braces": "{{ '{:>{}}'.format(1, 10 ** 9) }}",
    "replaced": "{% set s = 'a' * 30000 %}{{ s.replace('a', s) }}",
    "joined": f"{{{{ {R} | join('a' * 10000) }}}}",
    "written in a loop": f"{{% set s = 'a' * 100000 %}}{{% for a in {R} %}}{{{{ s }}}}{{% endfor %}}",
    "kept in a loop": f"{{% set s %}}{{% for a in {R} %}}{{{{ 'a' * 100000 }}}}{{% endfor %}}{{% endset %}}",
    "filler": "{{ lipsum(10 ** 9) }}",
}


@pytest.mark.parametrize("source", [*ENDLESS.values(), *LARGE.values()], ids=[*ENDLESS, *LARGE])
def test_a_rendering_ends_and_says_what_was_too_much(monkeypatch, source):
    monkeypatch.setattr(render_limit, "SECONDS", 0.2)
    monkeypatch.setattr(render_limit, "CHARACTERS", 2_000_000)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^rows.jsonl:3: the chat template refuses this conversation: .") as caught:
        ChatTemplate(source, {}, []).render(Row(where="rows.jsonl:3", domain="", messages=tuple(MESSAGES)))
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    if source in ENDLESS.values():
        assert "takes more than 0.2 s" in str(caught.value)
