"""Assistant spans and token labels, with and without {% generation %}."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from lmoe.data.account import Account
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.chats.template_settings import with_settings
from lmoe.data.chats.template_source import TEMPLATE_FILE, take_template
from lmoe.data.encode import Encoder, token_labels
from lmoe.data.rows.row import Row
from lmoe.errors import DataError, LmoeError
from lmoe.pretrain.bpe import CHAT_TEMPLATE
from lmoe.vocabulary import TrainOn
from tests.data.chats.templates import DATED, JOINING, LLAMA2_STYLE, QWEN_STYLE, THINKING, WITHOUT_GENERATION


def chat(*contents: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    turns = [
        {"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(contents)
    ]
    return tuple([{"role": "system", "content": system}, *turns] if system is not None else turns)


CONVERSATIONS = {
    "single": chat("What is the capital of France?", "Paris"),
    "multi-turn": chat("Two plus two?", "four", "three plus three?", "six"),
    "system": chat("a, b?", "c", system="You are an assistant."),
    "content equals user text": chat("a", "a", "a", "a"),
    "content equals a role": chat("user", "user", "assistant", "assistant"),
    "content is part of the header": chat("x", "ant", "y", "\n"),
    "content repeats earlier answer": chat("four four", "four", "again", "four"),
    "spaces around": chat("hi", "  Paris \n", " b ", "\n\n six\n"),
    "many bytes in one character": chat("é?", "ünï 🙂🇸🇪 好", "🙂", "🙂"),
    "empty turn": chat("hi", "", "b", "six"),
    "blank turn": chat("hi", "  ", "b", "six"),
    "assistant first": ({"role": "assistant", "content": "hello"}, {"role": "user", "content": "hello"}),
    "two in a row": (*chat("hi", "a"), {"role": "assistant", "content": "a"}),
    "no assistant": chat("hi"),
    "special token text": chat("hi", "see <|im_end|> there"),
}


def encode(
    tokenizer: PreTrainedTokenizerFast, messages: Any, template: str | None = None
) -> tuple[list[int], list[bool]]:
    if template is not None:
        tokenizer.chat_template = template
    encoder = Encoder(tokenizer, ChatTemplate.of(tokenizer, None), 10_000)
    [found] = encoder.tokenise([Row(messages=messages, text=None, domain="all", where="f:1")], Account())
    if isinstance(found, LmoeError):
        raise found
    return found.input_ids.tolist(), found.is_label.tolist()


def learnt(tokenizer: PreTrainedTokenizerFast, messages: Any, template: str | None = None) -> list[str]:
    """What each run of label tokens decodes to."""
    ids, labels = encode(tokenizer, messages, template)
    runs: list[list[int]] = []
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label:
            if index == 0 or not labels[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_offsets_give_the_same_labels_as_generation_tags(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tagged = encode(tokenizer, CONVERSATIONS[name])
    assert encode(tokenizer, CONVERSATIONS[name], WITHOUT_GENERATION) == tagged


@pytest.mark.parametrize("name", [n for n in CONVERSATIONS if "bytes" not in n])
def test_labels_equal_transformers_assistant_mask(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    # Without blank turns, of which transformers learns the end; it also misses the later bytes of a last character.
    messages = [m for m in CONVERSATIONS[name] if m["content"].strip()]
    reference = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = encode(tokenizer, tuple(messages))
    assert (ids, labels) == (reference["input_ids"], [bool(x) for x in reference["assistant_masks"]])


@pytest.mark.parametrize("template", [None, WITHOUT_GENERATION])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_label_tokens_decode_to_content_and_turn_end(
    tokenizer: PreTrainedTokenizerFast, name: str, template: str | None
) -> None:
    answers = [m["content"] for m in CONVERSATIONS[name] if m["role"] == "assistant" and m["content"].strip()]
    assert learnt(tokenizer, CONVERSATIONS[name], template) == [f"{answer}<|im_end|>" for answer in answers]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_stripping_template_is_followed(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    answers = [m["content"].strip() for m in CONVERSATIONS[name] if m["role"] == "assistant" and m["content"].strip()]
    assert learnt(tokenizer, CONVERSATIONS[name], QWEN_STYLE) == [f"{answer}<|im_end|>" for answer in answers]


def test_an_inserted_think_block_is_prompt_and_a_written_one_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert learnt(tokenizer, chat("hi", "Paris"), QWEN_STYLE) == ["Paris<|im_end|>"]
    thought = chat("hi", "<think>\nfour\n</think>\n\nParis")
    assert learnt(tokenizer, thought) == ["<think>\nfour\n</think>\n\nParis<|im_end|>"]
    untidy = chat("hi", "<think>four</think>Paris")
    assert learnt(tokenizer, untidy) == ["<think>\nfour\n</think>\n\nParis<|im_end|>"]


def test_thoughts_that_the_template_drops_are_not_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = chat("hi", "<think>\nParis\n</think>\n\nParis", "and?", "<think>\nb\n</think>\n\nb")
    expected = ["Paris<|im_end|>", "<think>\nb\n</think>\n\nb<|im_end|>"]
    assert learnt(tokenizer, messages, QWEN_STYLE) == expected


def test_the_eos_token_behind_a_space_ends_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = chat("a", "four", "b", "six")
    assert learnt(tokenizer, messages, LLAMA2_STYLE) == [" four <|im_end|>", " six <|im_end|>"]


def test_a_token_opening_the_next_turn_behind_white_space_is_not_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert [text.strip() for text in learnt(tokenizer, chat("a", "b", "c", "six"), template)] == ["b", "six"]


def test_a_template_file_comes_before_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(QWEN_STYLE, encoding="utf-8")
    assert ChatTemplate.of(tokenizer, str(file)).source == QWEN_STYLE
    with pytest.raises(DataError, match=r"data\.chat_template=.*nowhere"):
        ChatTemplate.of(tokenizer, str(tmp_path / "nowhere"))


REFUSED = {
    "rewritten": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
    "left out": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "length": "{% for m in messages %}{{ m.content + (m.content | length | string) }}{% endfor %}",
}


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED.keys())
def test_a_content_that_cannot_be_found_is_an_error_with_file_and_line(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    with pytest.raises(DataError, match=r"^f:1: .*messages\[1\].*data\.chat_template"):
        encode(tokenizer, chat("hi", "Paris"), template)


def test_no_template_says_what_to_do(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"^f:1: .*no chat template.*data\.chat_template=FILE.*plain text"):
        encode(tokenizer, chat("hi", "Paris"))


def test_a_conversation_the_template_refuses_is_an_error_with_file_and_line(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"^f:1: .*only user and assistant roles"):
        encode(tokenizer, chat("hi", "Paris", system="x"), LLAMA2_STYLE)


def test_a_token_with_one_character_in_a_span_is_a_label_token() -> None:
    offsets = [(0, 4), (4, 6), (6, 9), (9, 12)]
    assert token_labels(offsets, [(5, 9)]).tolist() == [False, True, True, False]
    assert token_labels(offsets, [(6, 10)]).tolist() == [False, False, True, True]
    assert token_labels(offsets, []).tolist() == [False] * 4


def test_bytes_of_one_character_are_labelled_together() -> None:
    assert token_labels([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(1, 2)]).tolist() == [False, True, True, True, False]


def test_offsets_trimmed_of_white_space_lose_no_token() -> None:
    # "a\n b c": line break, " b" and " c" as some byte-level tokenizers report them.
    offsets = [(0, 1), (2, 2), (3, 4), (5, 6)]
    assert token_labels(offsets, [(2, 6)]).tolist() == [False, False, True, True]


def test_no_tokens_have_no_labels() -> None:
    assert token_labels([], [(0, 1)]).tolist() == []


@pytest.mark.parametrize("template", [None, WITHOUT_GENERATION, QWEN_STYLE, LLAMA2_STYLE])
def test_a_tokenizer_that_trims_offsets_gives_the_same_labels(
    tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    messages = chat("a  b\n", "c  d\n\n e", " x ", "six  six")
    whole = encode(tokenizer, messages, template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert encode(tokenizer, messages, template) == whole


def test_a_tokenizer_without_offsets_reads_text_and_refuses_chats() -> None:
    slow = ByT5Tokenizer()
    encoder = Encoder(slow, ChatTemplate.of(slow, None), 64)
    [row] = encoder.encode([Row(messages=None, text="abc", domain="all", where="f:1")]).rows
    assert row.input_ids[-1] == slow.eos_token_id and len(row) == 4
    with pytest.raises(DataError, match=r"^f:1: ByT5Tokenizer gives no character offsets.*plain text"):
        encoder.encode([Row(messages=chat("a", "b"), text=None, domain="all", where="f:1")])


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHAT_TEMPLATE, ["<|im_end|>"]),
        (WITHOUT_GENERATION, ["<|im_end|>"]),
        (QWEN_STYLE, ["<|im_end|>"]),
        (LLAMA2_STYLE, ["<|im_end|>"]),  # the eos token of this tokenizer
        (LLAMA2_STYLE.replace("eos_token", "'<|endoftext|>'"), []),  # behind a space, and not the eos token: not learnt
        (CHAT_TEMPLATE.replace("'<|im_end|>' -}}{%- endgen", "'<|endoftext|>\\n' -}}{%- endgen"), ["<|endoftext|>"]),
        (CHAT_TEMPLATE.replace(" + '<|im_end|>' -}}{%- endgen", " -}}{%- endgen"), []),  # outside of what is learnt
        ("{{- raise_exception('no') -}}", []),
    ],
    ids=range(8),
)
def test_the_end_of_a_turn_is_the_special_token_that_training_labels_last(tokenizer, template, ends):
    tokenizer.chat_template = template
    assert ChatTemplate.of(tokenizer, None).turn_ends() == ends
    conversation = chat("What is the capital of France?", "Paris")
    if "raise_exception('no')" not in template:
        last = learnt(tokenizer, conversation)[-1].rstrip("\n")
        assert [token for token in ("<|im_end|>", "<|endoftext|>") if last.endswith(token)] == ends


def test_a_tokenizer_takes_the_template_of_a_file_and_saves_it_to_the_byte(tokenizer, tmp_path):
    given = "{# über #}\n" + QWEN_STYLE
    (tmp_path / "my.jinja").write_bytes(given.encode())
    take_template(tokenizer, None)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    take_template(tokenizer, str(tmp_path / "my.jinja"))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / TEMPLATE_FILE).read_bytes() == given.encode()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == given


TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": [1, True]}},
}
WITH_CALL = (
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3 C"},
    {"role": "assistant", "content": "It is 3 C."},
)
WRITTEN_CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, true]}}\n</tool_call><|im_end|>'
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def template_of(source: str, *added: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "<|im_end|>"}, SPECIAL, added, **more)


def row_of(messages: Any, **more: Any) -> Row:
    return Row(where="f:1", domain="all", messages=tuple(messages), **more)


def texts(template: ChatTemplate, row: Row) -> list[str]:
    rendered = template.render(row)
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_a_turn_that_calls_a_tool_is_learnt_whole_and_the_tools_are_shown() -> None:
    rendered = template_of(THINKING).render(row_of(WITH_CALL, tools=TOOLS))
    assert '"name": "weather", "parameters"' in rendered.text
    learnt = [rendered.text[start:end] for start, end in rendered.spans]
    assert learnt == [WRITTEN_CALL, "<think>\n\n</think>\n\nIt is 3 C.<|im_end|>"]
    assert (rendered.turns, rendered.endless, rendered.shortened) == (2, 0, 0)


def test_a_template_that_takes_no_plain_turn_in_place_of_a_call_and_arguments_as_text_only_is_followed() -> None:
    arguments = '{"city": "Oslo", "days": [1, true]}'
    call = f"[CALLS]weather {arguments};<|im_end|>"
    assert texts(template_of(JOINING), row_of(WITH_CALL, tools=TOOLS)) == [call, "It is 3 C.<|im_end|>"]
    twice = [*WITH_CALL, *({**m, "content": "And?"} if m["role"] == "user" else m for m in WITH_CALL)]
    assert texts(template_of(JOINING), row_of(twice)) == [call, "It is 3 C.<|im_end|>"] * 2


def test_arguments_are_json_however_a_template_writes_them() -> None:
    for written in ("c.function.arguments", "c.function.arguments | tojson", "c.function.arguments | string"):
        source = JOINING.replace(
            "{{- c.function.name + ' ' + c.function.arguments + ';' -}}",
            f"{{{{ c.function.name }}}} {{{{ {written} }}}}",
        )
        assert '{"city": "Oslo", "days": [1, true]}' in template_of(source).render(row_of(WITH_CALL)).text


@pytest.mark.parametrize(
    ("source", "messages", "tools", "said"),
    [
        (WITHOUT_GENERATION, WITH_CALL[:1], TOOLS, "the chat template shows no tools"),
        (CHAT_TEMPLATE, WITH_CALL, None, "the chat template shows no calls of tools"),
        ("{# no tool_calls #}" + CHAT_TEMPLATE, WITH_CALL, None, "does not show the calls of tools"),
    ],
)
def test_tools_that_the_template_does_not_show_are_refused(source, messages, tools, said) -> None:
    with pytest.raises(DataError, match=rf"^f:1: .*{said}.*data\.chat_template=FILE"):
        template_of(source).render(row_of(messages, tools=tools))


def test_a_developer_is_the_system_where_the_template_does_not_know_one() -> None:
    row = row_of([{"role": "developer", "content": "Be short."}, *chat("hi", "Paris")])
    assert "<|im_start|>system\nBe short." in template_of(WITHOUT_GENERATION).render(row).text
    assert "<|im_start|>developer\nBe short." in template_of("{# developer #}" + WITHOUT_GENERATION).render(row).text


def test_thoughts_in_a_field_of_their_own_are_learnt_and_those_that_the_template_drops_are_counted() -> None:
    first, last = ({"role": "assistant", "content": text, "reasoning_content": "hm"} for text in ("Paris", "Rome"))
    row = row_of([*chat("a"), first, *chat("b"), last])
    rendered = template_of(THINKING).render(row)
    learnt = [rendered.text[start:end] for start, end in rendered.spans]
    assert learnt == ["Paris<|im_end|>", "<think>\nhm\n</think>\n\nRome<|im_end|>"]
    assert rendered.shortened == 1
    assert template_of(WITHOUT_GENERATION).render(row).shortened == 2
    assert template_of(CHAT_TEMPLATE).render(row).shortened == 2
    written = WITHOUT_GENERATION.replace("message['content']", "(message.thinking or '') + message['content']")
    assert texts(template_of(written), row_of([*chat("a"), first])) == ["hmParis<|im_end|>"]


def test_thoughts_in_the_content_that_the_template_drops_are_counted() -> None:
    row = row_of(chat("hi", "<think>\nParis\n</think>\n\nParis", "and?", "<think>b</think>b"))
    assert template_of(QWEN_STYLE).render(row).shortened == 1
    assert template_of(WITHOUT_GENERATION).render(row).shortened == 0


def test_what_the_model_has_to_write_before_the_content_is_learnt_unless_the_prompt_has_it() -> None:
    row = row_of(chat("hi", "Paris"))
    assert texts(template_of(THINKING), row) == ["<think>\n\n</think>\n\nParis<|im_end|>"]
    without = template_of(with_settings(THINKING, {"enable_thinking": False}))
    assert texts(without, row) == ["Paris<|im_end|>"]
    assert texts(template_of(THINKING.replace("add_generation_prompt", "false")), row) == ["Paris<|im_end|>"]


MUTED = row_of(chat("one", "a", "two", "b", "three", "c"), muted=frozenset({3}))


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, WITHOUT_GENERATION], ids=["marked", "unmarked"])
def test_turns_that_are_muted_or_not_asked_for_are_not_learnt(source: str) -> None:
    assert texts(template_of(source), MUTED) == ["a<|im_end|>", "c<|im_end|>"]
    assert texts(template_of(source, train_on=TrainOn.last), MUTED) == ["c<|im_end|>"]
    last_muted = row_of(MUTED.messages, muted=frozenset({5}))
    assert template_of(source, train_on=TrainOn.last).render(last_muted).spans == []
    everything = template_of(source, train_on=TrainOn.all).render(MUTED)
    rest = [everything.text[start:end] for start, end in everything.spans]
    assert "b<|im_end|>".join(rest) == everything.text and len(rest) == 2
    assert (everything.turns, everything.endless, everything.shortened) == (2, 0, 0)


def test_marks_that_are_not_one_a_turn_are_told_apart_by_the_turns() -> None:
    twice = CHAT_TEMPLATE.replace(
        "message['content']",
        "message['content'][:1] -}}{%- endgeneration -%}{%- generation -%}{{- message['content'][1:]",
        1,
    )
    assert twice.count("{%- generation -%}") == CHAT_TEMPLATE.count("{%- generation -%}") + 1
    row = row_of(chat("one", "aa", "two", "bb"), muted=frozenset({1}))
    assert "".join(texts(template_of(twice), row)) == "bb<|im_end|>"


def test_an_end_that_is_not_special_and_one_behind_a_line_break_are_learnt() -> None:
    row = row_of(chat("hi", "Paris"))
    other = WITHOUT_GENERATION.replace("<|im_end|>", "<end>")
    assert texts(template_of(other, "<end>"), row) == ["Paris<end>"]
    broken = WITHOUT_GENERATION.replace("'<|im_end|>'", "'\\n<|im_end|>'")
    assert texts(template_of(broken), row) == ["Paris\n<|im_end|>"]
    assert template_of(other, "<end>").turn_ends() == ["<end>"]


@pytest.mark.parametrize(
    "source",
    [
        CHAT_TEMPLATE.replace(" + '<|im_end|>' -}}{%- endgen", " -}}{%- endgen"),
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
    ],
    ids=["marks that close before the end", "no end"],
)
def test_turns_whose_end_is_not_learnt_are_counted(source: str) -> None:
    rendered = template_of(source).render(row_of(chat("hi", "Paris", "b", "six")))
    assert (rendered.turns, rendered.endless) == (2, 2)


def test_an_eos_token_directly_behind_the_first_end_is_learnt_with_it_and_one_that_opens_the_next_turn_is_not() -> None:
    two = WITHOUT_GENERATION.replace("'<|im_end|>'", "'<end><|im_end|>'")
    assert texts(template_of(two, "<end>"), row_of(chat("hi", "Paris"))) == ["Paris<end><|im_end|>"]
    doubled = WITHOUT_GENERATION.replace("'<|im_end|>'", "'<|im_end|><|im_end|>'")
    assert texts(template_of(doubled), row_of(chat("hi", "Paris"))) == ["Paris<|im_end|>"]


EOS_MARKED = CHAT_TEMPLATE + "{%- generation -%}{{- eos_token -}}{%- endgeneration -%}"
"""As TRL's for Phi, whose last turn has the eos token behind its end."""


def test_marks_that_touch_are_one_and_a_mark_of_a_token_alone_behind_another_turn_is_not_learnt() -> None:
    marked = EOS_MARKED.replace("'<|im_end|>' -}}{%- endgen", "'<end>' -}}{%- endgen").replace("'\\n' -}}", "'' -}}")
    last = "six<end><|im_end|>"
    conversation = chat("hi", "Paris", "b", "six")
    for muted, expected in ((frozenset(), ["Paris<end>", last]), (frozenset({1}), [last])):
        assert texts(template_of(marked, "<end>"), row_of(conversation, muted=muted)) == expected
    assert texts(template_of(marked, "<end>"), row_of(conversation[:3])) == ["Paris<end>"]


INTO_THE_TURN = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content + '!' -}}
{%- if not loop.last -%}{{- '(' + messages[loop.index].content WRITTEN + ')' -}}{%- endif -%}
{{- '<|im_end|>' -}}{%- endgeneration -%}
{%- elif loop.first -%}{{- m.content -}}
{%- endif -%}
{%- endfor -%}
"""
"""Writes into a turn of the assistant, and marks, what comes behind it."""


def test_what_others_say_is_cut_out_of_a_mark_or_the_row_is_refused() -> None:
    row = row_of(chat("hi", "Paris", "my words", "six"))
    cut = texts(template_of(INTO_THE_TURN.replace("WRITTEN", "| tojson")), row)
    assert cut == ['Paris!("', '")<|im_end|>', "six!<|im_end|>"]
    counting = template_of(INTO_THE_TURN.replace("WRITTEN", "+ (messages[0].content | length | string)"))
    with pytest.raises(DataError, match=r"^f:1: .*what is said in another turn into a turn of the assistant"):
        counting.render(row)


def test_a_turn_that_a_muted_one_stands_before_without_a_prompt_of_its_own_begins_behind_it() -> None:
    source = THINKING.replace("{{- '<|im_start|>assistant\\n' -}}\n{%- if loop", "{{- HEAD -}}\n{%- if loop")
    head = "('' if loop.index0 and messages[loop.index0 - 1].role == 'assistant' else '<|im_start|>assistant\\n')"
    assert "HEAD" in source
    row = row_of((*chat("hi", "Paris"), {"role": "assistant", "content": "six"}), muted=frozenset({1}))
    found = template_of(source.replace("HEAD", head))
    assert "assistant\nParis" in found.render(row).text
    assert "Paris" not in "".join(texts(found, row))


def test_a_plain_conversation_is_rendered_twice_and_once_more_where_a_turn_is_more_than_its_content(
    monkeypatch,
) -> None:
    rendered: list[int] = []
    run = ChatTemplate._run
    monkeypatch.setattr(ChatTemplate, "_run", lambda *given, **named: rendered.append(1) or run(*given, **named))
    for source, times in ((WITHOUT_GENERATION, 2), (CHAT_TEMPLATE, 1), (THINKING, 3)):
        template = template_of(source)
        for _ in range(2):  # the first row has the template's own ways found out
            rendered.clear()
            template.render(row_of(chat(*map(str, range(20)))))
        assert len(rendered) == times


def test_rows_with_tools_are_rendered_by_the_template_of_that_name(tokenizer, tmp_path) -> None:
    tokenizer.chat_template = {"default": QWEN_STYLE, "tool_use": THINKING, "rag": QWEN_STYLE}
    template = ChatTemplate.of(tokenizer)
    assert "<|im_start|>tools" in template.render(row_of(WITH_CALL, tools=TOOLS)).text
    plain = row_of(chat("hi", "Paris"))
    assert template.render(plain) == ChatTemplate.of(tokenizer, str(write(tmp_path, QWEN_STYLE))).render(plain)
    assert template.turn_ends() == ["<|im_end|>"]
    other = template.identity
    tokenizer.chat_template = {"default": QWEN_STYLE, "tool_use": THINKING + " "}
    assert other != ChatTemplate.of(tokenizer).identity != QWEN_STYLE
    take_template(tokenizer, None, {"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template["default"] == QWEN_STYLE
    assert saved.chat_template["tool_use"] == with_settings(THINKING + " ", {"enable_thinking": False})
    with pytest.raises(DataError, match=r"data\.template_kwargs\.other: the chat template does not read other"):
        take_template(saved, None, {"other": 1})


def write(folder: Path, source: str) -> Path:
    file = folder / "given.jinja"
    file.write_text(source, encoding="utf-8")
    return file


def test_a_template_that_reads_the_date_is_told_the_day_that_is_given() -> None:
    row = row_of(chat("hi", "Paris"))
    dated = template_of(DATED, day="2026-01-31")
    assert dated.render(row).text.startswith("Today is 31 Jan 2026.\n")
    assert texts(dated, row) == ["Paris<|im_end|>"]


def test_the_identity_holds_all_that_labels_depend_on() -> None:
    plain = template_of(CHAT_TEMPLATE, day="2026-01-31")
    assert plain.identity == CHAT_TEMPLATE, "as rows were cached before"
    days = {template_of(DATED, day=day).identity for day in ("2026-01-31", "2026-02-01")}
    parts = {template_of(CHAT_TEMPLATE, train_on=train_on).identity for train_on in TrainOn}
    assert len(days) == 2 and len(parts) == 3
    assert template_of(DATED).identity == template_of(DATED, day=date.today().isoformat()).identity


@pytest.mark.parametrize(
    ("source", "differs"),
    [
        (CHAT_TEMPLATE, False),
        (WITHOUT_GENERATION, False),
        (QWEN_STYLE, False),
        (LLAMA2_STYLE, False),
        (JOINING, False),
        (THINKING, True),
        (WITHOUT_GENERATION.replace("<|im_end|>", "<end>"), True),
        (WITHOUT_GENERATION.replace("'<|im_end|>'", "'\\n<|im_end|>'"), True),
        (WITHOUT_GENERATION.replace("'<|im_end|>'", "'<|im_start|><|im_end|>'"), True),
        (EOS_MARKED.replace("'\\n' -}}", "'' -}}"), True),
        ("{{- raise_exception('no') -}}", False),
    ],
    ids=range(11),
)
def test_the_identity_is_the_bare_text_unless_turns_were_labelled_otherwise_before(source: str, differs: bool) -> None:
    identity = template_of(source, "<end>").identity
    assert (identity != source) == differs


def test_settings_are_saved_with_the_tokenizers_template(tokenizer, tmp_path):
    tokenizer.chat_template = THINKING
    take_template(tokenizer, None, {"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    turn = [{"role": "user", "content": "hi"}]
    asked = again.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("assistant\n<think>\n\n</think>\n\n")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data\.template_kwargs sets a, and the tokenizer has no chat template"):
        take_template(tokenizer, None, {"a": 1})
