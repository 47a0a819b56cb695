"""Batches of prompts: each row's answer is its own, whatever stands beside it, as far as the context reaches."""

import pytest
import torch

from lmoe.errors import BackboneError, DataError, RoutingError
from lmoe.generate.batches import BatchAnswers, RowSampling, batches_of
from lmoe.generate.generate import Sampling, continue_ids
from lmoe.pretrain.bpe import train_bpe
from tests.generate.near_ties import part_at_a_near_tie
from tests.injection.tiny_injected import tiny_injected
from tests.tiny_models import tiny_model, tokens

PROMPTS = [tokens(1, length, seed=length)[0] for length in (4, 9, 2, 6)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["hello hello"], 300, 64)


def answering(model, tokenizer, **sampling) -> BatchAnswers:
    return BatchAnswers(model=model, tokenizer=tokenizer, sampling=Sampling(**{"max_new_tokens": 8} | sampling))


def answers(model, tokenizer, order=(0, 1, 2, 3), **sampling) -> dict[int, list[int]]:
    """By number of the prompt, answered in one batch of that order."""
    batch = answering(model, tokenizer, **sampling)
    found = batch.answer([PROMPTS[i] for i in order], numbers=order)
    return {i: answer.ids.tolist() for i, answer in zip(order, found, strict=True)}


def without_end(model):
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text", "qwen3_5_text"])
def test_a_short_prompt_has_all_its_room_beside_one_that_fills_the_context(family, tokenizer):
    """Also where positions are learnt (GPT-2), and none lies beyond the context."""
    context = {"max_position_embeddings": 24, **({"n_positions": 24} if family == "gpt2" else {})}
    model = without_end(tiny_model(family, **context))
    prompts = [tokens(1, length, seed=length)[0] for length in (20, 5, 13, 20)]
    batch = answering(model, tokenizer, max_new_tokens=1000)
    batch.ends = []
    found = batch.answer(prompts, numbers=range(4))
    assert [len(answer.ids) for answer in found] == [4, 19, 11, 4]
    assert not any(answer.ended for answer in found)
    for prompt, answer in zip(prompts[1:3], found[1:3], strict=True):
        (alone,) = batch.answer([prompt], numbers=[0])
        assert torch.equal(answer.ids, alone.ids) or part_at_a_near_tie(model, prompt, answer.ids, alone.ids)


def test_an_answer_that_ends_stands_without_what_comes_after_its_end(tokenizer):
    batch = answering(without_end(tiny_model()), tokenizer)
    batch.ends = []
    whole = [answer.ids.tolist() for answer in batch.answer(PROMPTS, numbers=range(4))]
    end = whole[1][2]
    batch.ends = [end]
    found = batch.answer(PROMPTS, numbers=range(4))
    assert 1 <= sum(answer.ended for answer in found) < 4
    for answer, ids in zip(found, whole, strict=True):
        place = ids.index(end) + 1 if end in ids else None
        assert (answer.ids.tolist(), answer.ended) == (ids[:place], place is not None)


def test_a_repetition_penalty_counts_the_tokens_of_the_row_and_no_padding(tokenizer):
    model = without_end(tiny_model())
    for i, ids in answers(model, tokenizer, repetition_penalty=1.7).items():
        sampling = Sampling(max_new_tokens=8, repetition_penalty=1.7)
        assert ids == continue_ids(model, tokenizer, PROMPTS[i][None], sampling).tolist()


def test_what_a_row_draws_depends_neither_on_its_batch_nor_on_the_order(tokenizer):
    model, hot = without_end(tiny_model()), {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    together = answers(model, tokenizer, **hot)
    assert together == answers(model, tokenizer, [3, 1, 0, 2], **hot)
    assert together == {i: answers(model, tokenizer, [i], **hot)[i] for i in range(4)}
    assert together != answers(model, tokenizer, **{**hot, "seed": 4})
    assert together != answers(model, tokenizer)


def test_rows_with_one_prompt_draw_answers_of_their_own(tokenizer):
    batch = answering(without_end(tiny_model()), tokenizer, temperature=3.0)
    found = batch.answer([PROMPTS[0]] * 3, numbers=range(3))
    assert len({tuple(answer.ids.tolist()) for answer in found}) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [0.4, 0.3, 0.2, 0.1]), ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]), ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0])],
)
def test_tokens_are_drawn_with_their_probabilities(settings, expected):
    """3,000 rows draw once; a share's standard deviation is at most 0.009."""
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().mul(2.0).repeat(3000, 1)  # of temperature 2
    drawn = RowSampling(Sampling(temperature=2.0, **settings), range(3000))(None, scores)
    assert (drawn.isfinite().sum(-1) == 1).all()
    share = drawn.argmax(-1).bincount(minlength=4) / 3000
    torch.testing.assert_close(share, torch.tensor(expected), atol=0.035, rtol=0)
    assert not share[torch.tensor(expected) == 0].any()


def test_scores_that_are_no_numbers_are_not_drawn_from():
    with pytest.raises(BackboneError, match="no numbers"):
        RowSampling(Sampling(temperature=1.0), [0])(None, torch.tensor([[0.0, torch.nan]]))


def test_like_lengths_stand_together_and_the_longest_first():
    assert batches_of([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
    assert batches_of([], 2) == []


@pytest.mark.parametrize(("length", "words"), [(0, "the prompt is empty"), (64, "has 64 tokens; the backbone's")])
def test_a_prompt_without_room_is_refused(tokenizer, length, words):
    with pytest.raises(DataError, match=words):
        answering(tiny_model(), tokenizer).answer([PROMPTS[0], tokens(1, length)[0]], numbers=[0, 1])


def test_an_oracle_without_an_expert_for_a_row_names_its_domain(tokenizer):
    with pytest.raises(RoutingError, match="no expert for the domain 'art'"):
        answering(tiny_injected("oracle"), tokenizer).answer(PROMPTS[:2], numbers=[0, 1], domains=["maths", "art"])
