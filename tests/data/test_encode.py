"""Cutting, dropping and counting rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lmoe.config.data import DataConfig
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.collate import Collate
from lmoe.data.encode import NO_ASSISTANT_TEXT, NO_TEXT, NOTHING_TO_PREDICT, EncodedSource, Encoder, cut_reason
from lmoe.data.encoded import opening
from lmoe.data.prepare import prepare
from lmoe.data.rows.row import Row
from lmoe.errors import DataError
from lmoe.vocabulary import OnBadRow
from tests.data.chats.test_template import chat


def row(*contents: str, text: str | None = None, domain: str = "all") -> Row:
    return Row(messages=None if text is not None else chat(*contents), text=text, domain=domain, where="f:1")


def encode(tokenizer: PreTrainedTokenizerFast, *rows: Row, max_length: int = 512) -> EncodedSource:
    return Encoder(tokenizer, ChatTemplate.of(tokenizer, None), max_length).encode(rows)


def test_text_rows_are_learnt_whole_up_to_an_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    [encoded] = encode(tokenizer, row(text="Two plus two")).rows
    assert tokenizer.decode(encoded.input_ids) == "Two plus two<|im_end|>"
    assert encoded.is_label.all()


def test_an_eos_is_not_written_twice_nor_without_one(tokenizer: PreTrainedTokenizerFast) -> None:
    [encoded] = encode(tokenizer, row(text="Two<|im_end|>")).rows
    assert tokenizer.decode(encoded.input_ids) == "Two<|im_end|>"
    tokenizer.eos_token = None
    [encoded] = encode(tokenizer, row(text="Two plus")).rows
    assert tokenizer.decode(encoded.input_ids) == "Two plus"


def test_text_rows_need_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    assert len(encode(tokenizer, row(text="Two plus two")).rows) == 1


def test_order_and_domains_survive_mixed_formats(tokenizer: PreTrainedTokenizerFast) -> None:
    source = encode(tokenizer, row("a", "b"), row(text="six", domain="z"), row("c", "four", domain="m"))
    assert source.domains == ["all", "m", "z"]
    assert source.rows.domains.tolist() == [0, 2, 1]
    assert "b" in tokenizer.decode(source.rows[0].input_ids) and "four" in tokenizer.decode(source.rows[2].input_ids)


def test_rows_are_cut_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, row("hi", "four " * 50)).rows[0]
    cut = encode(tokenizer, row("hi", "four " * 50), max_length=20)
    assert cut.account.truncated == 1 and len(cut.rows[0]) == 20
    assert cut.rows[0].input_ids.tolist() == whole.input_ids[:20].tolist()


def test_dropped_rows_are_counted_by_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    source = encode(
        tokenizer, row("hi", ""), row("hi"), row("hi " * 50, "x"), row(text=" "), row("hi", "x"), max_length=30
    )
    assert source.account.dropped == {NO_ASSISTANT_TEXT: 2, cut_reason(30): 1, NO_TEXT: 1}
    assert (source.account.read, len(source.rows), source.account.truncated) == (5, 1, 0)


def test_a_label_on_the_first_token_alone_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    source = encode(tokenizer, row(text="a"))
    assert source.account.dropped == {NOTHING_TO_PREDICT: 1} and len(source.rows) == 0


def test_the_cut_that_leaves_one_label_keeps_the_row_and_one_less_drops_it(tokenizer: PreTrainedTokenizerFast) -> None:
    [whole] = encode(tokenizer, row("hi", "four")).rows
    first = whole.is_label.tolist().index(True)
    assert encode(tokenizer, row("hi", "four"), max_length=first + 1).rows.label_tokens() == 1
    assert encode(tokenizer, row("hi", "four"), max_length=first).account.dropped == {cut_reason(first): 1}


def test_a_text_that_brings_the_bos_token_of_the_tokenizer_gets_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    without, brought = encode(tokenizer, row(text="Two plus"), row(text="<|im_start|>Two plus")).rows
    assert brought.input_ids.tolist() == without.input_ids.tolist()
    assert without.input_ids.tolist().count(bos) == 1
    assert brought.is_label.all() and opening(brought) == opening(without) > 1
    batches = [Collate(0, 64, packed=False)([row]) for row in (without, brought)]
    assert batches[0].keys() == batches[1].keys() and "opening_mask" in batches[0]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_a_row_with_a_token_beyond_the_embedding_is_refused_by_name_and_by_its_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any
) -> None:
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    path = write_rows({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "<think> b"}, {"text": "four"})
    config = DataConfig(path=path, cache_dir=str(tmp_path / "cache"), val_fraction=0.4)
    given = {"seed": 0, "bundled": Path("nowhere"), "packing_model_type": None}
    assert len(prepare(config, tokenizer, **given, num_embeddings=size + 1).train) == 2
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: it uses '<think>' \({size}\); .*embedding.* {size}: resize"):
        prepare(config, tokenizer, **given, num_embeddings=size)
    config.on_bad_row = OnBadRow.drop
    found = prepare(config, tokenizer, **given, num_embeddings=size)
    assert (len(found.train), len(found.val)) == (1, 1) and "1 of 3 rows cannot be used" in found.report.notes()[0]
    assert len(prepare(config, tokenizer, **given, num_embeddings=size + 1).train) == 2


# --- a text before prompts


def prefixed(tokenizer: PreTrainedTokenizerFast, prefix: str | None, *rows: Row) -> EncodedSource:
    return Encoder(tokenizer, ChatTemplate.of(tokenizer, None), 512, prompt_prefix=prefix).encode(rows)


def test_a_prefix_gives_the_tokens_of_rows_that_have_it_written_before_the_first_message_of_the_user(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    system = {"role": "system", "content": "You answer."}
    talk = chat("two plus two", "four", "six plus six", "twelve")
    given = Row(messages=(system, *talk), muted=frozenset({4}), domain="math", where="f:1")
    written = ({**talk[0], "content": "{math} {x} {} two plus two"}, *talk[1:])
    expected = encode(tokenizer, Row(messages=(system, *written), muted=given.muted, domain="math", where="f:1"))
    found = prefixed(tokenizer, "{{domain}} {x} {} ", given)
    assert found.rows[0].input_ids.equal(expected.rows[0].input_ids)
    assert found.rows[0].is_label.equal(expected.rows[0].is_label) and found.account == expected.account
    assert given.messages is not None and given.messages[1]["content"] == "two plus two"


def test_rows_without_a_message_of_the_user_have_no_prefix_and_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    alone = Row(messages=({"role": "assistant", "content": "four"},), domain="all", where="f:2")
    rows = row(text="two"), alone, row("six", "four")
    found, plain = prefixed(tokenizer, "a ", *rows), encode(tokenizer, *rows)
    same = [a.input_ids.equal(b.input_ids) for a, b in zip(found.rows, plain.rows, strict=True)]
    assert same == [True, True, False]
    assert (found.account.unprefixed, plain.account.unprefixed) == (2, 0)
