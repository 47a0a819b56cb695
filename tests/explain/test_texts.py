"""Texts to explain: rows as training sees them, prompts, and what models must share to be compared."""

import pytest
import torch

from lmoe.config.data import DataConfig
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import Encoder
from lmoe.data.encoded import opening
from lmoe.data.rows.row import Row
from lmoe.errors import ConfigError
from lmoe.explain.texts import kept_tokens, of_encoded, of_rows, same_tokens, text_of
from lmoe.pretrain.bpe import train_bpe
from lmoe.vocabulary import TrainOn
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["What is red? red is a colour."] * 4, 300, 128)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_answers_of_all_turns_are_told_from_prompts_and_a_long_row_is_cut(tokenizer) -> None:
    turns = (turn("user", "a"), turn("assistant", "red"), turn("user", "b"), turn("assistant", "is a colour"))
    row = Row(messages=turns, domain="code", where="f:1")
    [text] = of_rows(tokenizer, [row])
    answers = "".join(one for one, answer in zip(text.texts, text.answer.tolist(), strict=True) if answer)
    assert answers == "red<|im_end|>is a colour<|im_end|>" and (text.name, text.domain, text.cut) == ("f:1", "code", 0)
    first, turns_too = (text.prompts(of_all_turns=every, openings=True) for every in (False, True))
    assert torch.equal(turns_too, ~text.answer) and int(first.sum()) < int(turns_too.sum())
    [short] = of_rows(tokenizer, [row], most=9)
    assert len(short) == 9 and short.cut == len(text) - 9 and torch.equal(short.ids, text.ids[:9])


def test_prefix_and_learnt_turns_are_those_of_the_run(tokenizer) -> None:
    turns = (turn("user", "a"), turn("assistant", "red"), turn("user", "b"), turn("assistant", "is a colour"))
    data = DataConfig(prompt_prefix="[{domain}] ", train_on=TrainOn.last)
    [text] = of_rows(tokenizer, [Row(messages=turns, domain="code", where="f:1")], data=data)
    answers = "".join(one for one, answer in zip(text.texts, text.answer.tolist(), strict=True) if answer)
    assert answers == "is a colour<|im_end|>" and "[code] a" in "".join(text.texts)


def test_of_a_pair_the_preferred_answer_is_explained_and_plain_text_is_an_answer_from_its_second_token(
    tokenizer,
) -> None:
    pair = Row(
        messages=(turn("user", "a"),),
        chosen=(turn("assistant", "red"),),
        rejected=(turn("assistant", "colour"),),
        domain="all",
        where="f:1",
    )
    plain = Row(text="red is a colour", domain="all", where="f:2")
    of_pair, of_plain = of_rows(tokenizer, [pair, plain])
    assert "red<|im_end|>" in "".join(of_pair.texts) and "colour" not in "".join(of_pair.texts)
    assert not of_plain.answer[0] and bool(of_plain.answer[1:].all())
    assert of_plain.prompts(of_all_turns=False, openings=False).tolist() == [True] + [False] * (len(of_plain) - 1)


def test_the_opening_of_a_row_without_a_prompt_is_that_of_training_however_much_of_it_is_explained(tokenizer) -> None:
    turns = (turn("user", "a"), turn("assistant", "red is a colour"))
    plain, chat = (
        Row(text="red is a colour? " * 40, domain="all", where="f:1"),
        Row(messages=turns, domain="all", where="f:2"),
    )
    data = DataConfig(train_on=TrainOn.all, max_length=60)
    encoder = Encoder(tokenizer, ChatTemplate.of(tokenizer, train_on=TrainOn.all), 60)
    for row in (plain, chat):
        learnt = encoder.encode([row]).rows[0]
        assert bool(learnt.is_label[0]) and 1 < opening(learnt) <= 30
        [whole] = of_rows(tokenizer, [row], data=data)
        [short] = of_rows(tokenizer, [row], data=data, most=len(learnt) - 3)
        encoded = of_encoded(tokenizer, learnt, name="x", domain="all", most=len(learnt) - 3)
        for text in (whole, short, encoded):
            for every in (False, True):
                found = text.prompts(of_all_turns=every, openings=True)
                assert found.tolist() == [place < opening(learnt) for place in range(len(text))]
    [asked] = of_rows(tokenizer, [chat])
    assert asked.opening == 0 and torch.equal(asked.prompts(of_all_turns=True, openings=True), ~asked.answer)


def test_a_row_is_cut_where_the_context_of_the_backbone_ends() -> None:
    model = tiny_model(max_position_embeddings=24)
    assert (kept_tokens(model, 100), kept_tokens(model, 10)) == (24, 10)


def test_a_character_of_several_tokens_belongs_to_the_first(tokenizer) -> None:
    ids = torch.tensor(tokenizer("é日")["input_ids"])
    text = text_of(tokenizer, ids, torch.ones(len(ids)), name="x")
    assert "".join(text.texts) == "é日" and len(text.texts) == len(ids) > 2 and text.texts[1] == ""


def test_models_of_other_tokens_are_not_compared(tokenizer) -> None:
    same_tokens(tokenizer, tokenizer, "run")
    with pytest.raises(ConfigError, match="run has another vocabulary"):
        same_tokens(tokenizer, train_bpe(["other words"] * 3, 280, 64), "run")
