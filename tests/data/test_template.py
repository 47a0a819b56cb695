"""Assistant spans and token labels, with and without {% generation %}."""

from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from lmoe.data.account import Account
from lmoe.data.encode import Encoder, token_labels
from lmoe.data.row import Row
from lmoe.data.template import TEMPLATE_FILE, ChatTemplate, take_template
from lmoe.errors import DataError, LmoeError
from lmoe.pretrain.bpe import CHAT_TEMPLATE
from tests.data.templates import LLAMA2_STYLE, QWEN_STYLE, WITHOUT_GENERATION


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
