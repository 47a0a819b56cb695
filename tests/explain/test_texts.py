"""Texts to explain: rows as training sees them, prompts, and what models must share to be compared."""

import pytest
import torch

from lmoe.config.data import DataConfig
from lmoe.data.rows.row import Row
from lmoe.errors import ConfigError
from lmoe.explain.texts import of_rows, same_tokens, text_of
from lmoe.pretrain.bpe import train_bpe
from lmoe.vocabulary import TrainOn


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
    first, turns_too = text.prompts(of_all_turns=False), text.prompts(of_all_turns=True)
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
    assert of_plain.prompts(of_all_turns=False).tolist() == [True] + [False] * (len(of_plain) - 1)


def test_a_character_of_several_tokens_belongs_to_the_first(tokenizer) -> None:
    ids = torch.tensor(tokenizer("é日")["input_ids"])
    text = text_of(tokenizer, ids, torch.ones(len(ids)), name="x")
    assert "".join(text.texts) == "é日" and len(text.texts) == len(ids) > 2 and text.texts[1] == ""


def test_models_of_other_tokens_are_not_compared(tokenizer) -> None:
    same_tokens(tokenizer, tokenizer, "run")
    with pytest.raises(ConfigError, match="run has another vocabulary"):
        same_tokens(tokenizer, train_bpe(["other words"] * 3, 280, 64), "run")
