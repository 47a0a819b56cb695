"""Tokens and labels of real tokenizers: byte-level BPE, and BPE with a fallback to bytes."""

from functools import cache

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.collate import Collate
from lmoe.data.encode import Encoder
from lmoe.data.encoded import EncodedRow
from lmoe.data.rows.row import Row
from lmoe.ops.labels import IGNORE
from tests.data.chats.public_templates import AXOLOTL, CODE, LONGEST, ROWS, TRL, outcome_of
from tests.public_packages import TOKENIZERS, public_folder

TEMPLATES = {
    "smollm2": "tokenizers/smollm2/chat_template.jinja",
    "deepseek": f"{TRL}/deepseekv3.jinja",
    "mistral-v1": f"{AXOLOTL}/mistral_v1.jinja",
    "mistral-v3": f"{AXOLOTL}/mistral_v2v3.jinja",
}
ENDS = {"smollm2": "<|im_end|>", "deepseek": "<｜end▁of▁sentence｜>", "mistral-v1": "</s>", "mistral-v3": "</s>"}
STARTS = {"mistral-v1": ["<s>"], "mistral-v3": ["<s>"]}
"""Tokens that a tokenizer puts before any text."""
ANSWERS = {
    "one turn": ["Paris."],
    "two turns": ["Four.", "Six."],
    "a system prompt": ["Paris."],
    "repeated words": ["four", "four four"],
    "accents and emoji": ["Ünï 🙂🇸🇪 好 ﬁ"],  # the ligature is not normalised to two letters
    "code": [CODE],
    "a muted turn": ["Six."],
    "an empty turn": ["Six."],
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(public_folder() / TOKENIZERS / name)
    tokenizer.chat_template = (public_folder() / TEMPLATES[name]).read_text(encoding="utf-8")
    return tokenizer


def encoded(name: str, *rows: Row) -> list[EncodedRow]:
    tokenizer = tokenizer_of(name)
    return list(Encoder(tokenizer, ChatTemplate.of(tokenizer), LONGEST).encode(rows).rows)


def text_row(text: str) -> Row:
    return Row(text=text, where="rows.jsonl:1", domain="all")


def tokens(name: str, row: EncodedRow, *, learnt: bool = False) -> list[str]:
    ids = row.input_ids[row.is_label] if learnt else row.input_ids
    return tokenizer_of(name).convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("row", ANSWERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_are_learnt_with_their_ends_and_to_the_letter(name, row):
    found = outcome_of(tokenizer_of(name), ROWS[row])
    assert found.learnt == [f"{answer}{ENDS[name]}" for answer in ANSWERS[row]]
    assert found.ends_missing == found.shortened == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_a_rendering_are_those_of_its_text(name):
    tokenizer = tokenizer_of(name)
    [row] = encoded(name, ROWS["accents and emoji"])
    text = ChatTemplate.of(tokenizer).render(ROWS["accents and emoji"]).text
    assert tokenizer.decode(row.input_ids.tolist()) == text


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("smollm2", ["Ġå", "¥", "½", "Ġï¬ģ", "<|im_end|>"]),
        ("deepseek", ["Ġ", "å¥½", "Ġï¬ģ", "<｜end▁of▁sentence｜>"]),
        ("mistral-v1", ["<0xF0>", "<0x9F>", "<0x87>", "<0xAA>", "▁", "好", "▁", "ﬁ", "</s>"]),
        ("mistral-v3", ["<0xF0>", "<0x9F>", "<0x87>", "<0xAA>", "▁", "好", "▁", "ﬁ", "</s>"]),
    ],
)
def test_every_byte_of_a_letter_is_learnt(name, last):
    [row] = encoded(name, ROWS["accents and emoji"])
    assert tokens(name, row, learnt=True)[-len(last) :] == last


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_is_learnt_whole_and_ends_with_one_end(name):
    for text in ("Ünï 🙂 ﬁ.", f"Ünï 🙂 ﬁ.{ENDS[name]}"):
        [row] = encoded(name, text_row(text))
        pieces = tokens(name, row)
        assert pieces[: len(STARTS.get(name, []))] == STARTS.get(name, [])
        assert pieces.count("<s>") == len(STARTS.get(name, []))
        assert (pieces[-1], pieces.count(ENDS[name])) == (ENDS[name], 1)
        assert row.is_label.all()
        decoded = tokenizer_of(name).decode(row.input_ids.tolist(), skip_special_tokens=True)
        assert decoded == "Ünï 🙂 ﬁ."


def test_where_the_end_of_a_turn_also_pads_the_end_is_learnt_and_the_padding_is_not():
    tokenizer = tokenizer_of("smollm2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = encoded("smollm2", ROWS["one turn"], ROWS["two turns"])
    batch = Collate(pad_token_id=tokenizer.pad_token_id, max_length=LONGEST, packed=False)(rows)
    for row, labels, ids in zip(rows, batch["labels"], batch["input_ids"], strict=True):
        assert (labels[: len(row)] == tokenizer.eos_token_id).sum() == {True: 1, False: 2}[row is rows[0]]
        assert (labels[len(row) :] == IGNORE).all() and (ids[len(row) :] == tokenizer.pad_token_id).all()
    assert len(rows[0]) < batch["labels"].shape[1]


def test_a_text_that_brings_the_token_before_it_gets_no_second_one():
    [row] = encoded("mistral-v1", text_row("<s>Hello there."))
    assert tokens("mistral-v1", row)[:2] != ["<s>", "<s>"]
