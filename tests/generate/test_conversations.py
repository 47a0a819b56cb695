"""In a conversation a router decides by the prompts that training decided by, never by its old answers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.collate import Collate
from lmoe.data.encode import Encoder
from lmoe.data.encoded import EncodedRow
from lmoe.data.rows.row import Row
from lmoe.generate.batches import BatchAnswers
from lmoe.generate.conversation import asked, prompt_ids
from lmoe.generate.earlier_answers import earlier_answers
from lmoe.generate.generate import Sampling, continue_ids
from lmoe.generate.row_prompts import RowPrompt
from lmoe.generate.speaker import Speaker
from lmoe.injection.batch_info import batch_info, conversations
from lmoe.injection.record import injected
from lmoe.objectives.model_inputs import ModelInputs
from lmoe.pretrain.bpe import train_bpe
from lmoe.vocabulary import TrainOn
from tests.injection.tiny_injected import tiny_injected

VOCAB, NEW = 300, 4
TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "say hello"},
    {"role": "assistant", "content": "hello to you"},
    {"role": "user", "content": "a = b"},
    {"role": "assistant", "content": "c = d + a"},
    {"role": "user", "content": "select a from b"},
]
OF_MODEL = {
    f"model, {decide}, {'on prompts too' if on else 'after prompts'}": {
        "router_scope": "model",
        "decide": decide,
        "prompt_experts": on,
    }
    for decide in ("first", "turn")
    for on in (False, True)
}
CASES = {
    "linear": ("sequence", {}),
    "block": ("sequence", {"router_scope": "block"}),
    "hash": ("prompt_hash", {}),
    **{name: ("sequence", moe) for name, moe in OF_MODEL.items()},
    "model, an early layer": ("sequence", {"router_scope": "model", "router_layer": 1}),
}
SAMPLING = Sampling(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([turn["content"] for turn in TURNS], VOCAB, 128)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    router, moe = CASES[request.param]
    model = tiny_injected(router, moe=moe, std=0.5, vocab_size=VOCAB, max_position_embeddings=256)
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def heard(model) -> Iterator[list[Tensor]]:
    """The last logits of each forward of the whole model."""
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda _module, _args, output: logits.append(output.logits[:, -1]))
    try:
        yield logits
    finally:
        hook.remove()


def in_training(model, tokenizer, turns, answer: Tensor) -> Tensor:
    """(N, V) logits from which training would learn the tokens of an answer."""
    messages = (*turns, {"role": "assistant", "content": "hello"})
    encoder = Encoder(tokenizer, ChatTemplate.of(tokenizer), 200)
    encoded = encoder.encode([Row(where="", domain="all", messages=messages)]).rows[0]
    ids, start = prompt_ids(tokenizer, turns)[0], prompt_ids(tokenizer, turns).shape[1]
    assert torch.equal(encoded.input_ids[:start].long(), ids) and bool(encoded.is_label[start])
    labels = torch.cat([encoded.is_label[:start], torch.ones(len(answer), dtype=torch.bool)])
    row = EncodedRow(torch.cat([ids, answer]).int(), labels, 0)
    batch = Collate(pad_token_id=0, max_length=200, packed=False)([row])
    with torch.no_grad(), batch_info(injected(model), batch, ["all"]):
        return model(**ModelInputs(model)(batch)).logits[0, start - 1 : start - 1 + len(answer)]


@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_logits_of_an_answer_are_those_that_training_gives_the_same_conversation(model, tokenizer, count):
    """With no, one and two answers before."""
    turns = TURNS[:count]
    ids = prompt_ids(tokenizer, turns)
    before = earlier_answers(tokenizer, asked(tokenizer, turns))
    assert (before is None) == (count == 2)
    with heard(model) as logits:
        answer = continue_ids(model, tokenizer, ids, SAMPLING, answers=before)
    assert len(answer) == NEW == len(logits)
    torch.testing.assert_close(torch.cat(logits), in_training(model, tokenizer, turns, answer), atol=2e-5, rtol=1e-4)


def test_a_chat_and_a_batch_of_rows_answer_a_conversation_as_it_is_answered_alone(model, tokenizer):
    """Beside a prompt without a history, and one with a shorter one, padded on the left."""
    speaker = Speaker(model=model, tokenizer=tokenizer, template_place="here")
    conversations = [TURNS, TURNS[:2], TURNS[:4]]
    alone = []
    for turns in conversations:
        ids = prompt_ids(tokenizer, turns)
        before = earlier_answers(tokenizer, asked(tokenizer, turns))
        alone.append(continue_ids(model, tokenizer, ids, SAMPLING, answers=before))
    rows = [RowPrompt(domain="all", prompt=turns) for turns in conversations]
    prompts = [row.asked(tokenizer) for row in rows]
    before = [row.answers(tokenizer, prompt, TrainOn.assistant) for row, prompt in zip(rows, prompts, strict=True)]
    answering = BatchAnswers(model=model, tokenizer=tokenizer, sampling=SAMPLING)
    found = answering.answer([prompt.ids for prompt in prompts], numbers=range(3), answers=before)
    assert [one.ids.tolist() for one in found] == [ids.tolist() for ids in alone]
    said = speaker.answer(list(TURNS), SAMPLING, lambda piece: None)
    assert said == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_the_old_answers_count_where_training_took_them_for_the_prompt(tokenizer):
    """data.train_on=last labels the last answer alone, and a muted turn carries no label."""
    prompt = asked(tokenizer, TURNS)
    ids, found = prompt.ids, earlier_answers(tokenizer, prompt)
    assert found is not None
    assert tokenizer.decode(ids[found]) == "hello to you<|im_end|>c = d + a<|im_end|>"
    assert earlier_answers(tokenizer, prompt, train_on=TrainOn.last) is None
    second = earlier_answers(tokenizer, prompt, muted={2})
    assert second is not None and tokenizer.decode(ids[second]) == "c = d + a<|im_end|>"


def test_answers_that_the_template_does_not_show_are_taken_for_prompt_and_that_is_said(tokenizer):
    other = train_bpe([turn["content"] for turn in TURNS], VOCAB, 128)
    other.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.warns(UserWarning, match="takes this whole conversation for the prompt"):
        assert earlier_answers(other, asked(other, TURNS)) is None
    other.chat_template = None
    assert earlier_answers(other, asked(other, TURNS)) is None


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x", "deep": True}}}
WITH_CALL = [
    {"role": "user", "content": "say hello"},
    {"role": "assistant", "content": "c = d", "tool_calls": [CALL]},
    {"role": "tool", "content": "a"},
]
FORMS = {
    "developer": [{"role": "developer", "content": "be kind"}, *TURNS[1:4]],
    "arguments": WITH_CALL,
    "thoughts": [TURNS[1], {**TURNS[2], "reasoning_content": "a = b"}, TURNS[3]],
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name + c.function.arguments }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows no developer, joins arguments as text, and reads `thinking`."""


@pytest.mark.parametrize("name", FORMS)
def test_a_template_is_asked_in_the_form_in_which_training_gives_it_a_conversation(tokenizer, name):
    other = train_bpe([turn["content"] for turn in TURNS], VOCAB, 128)
    other.chat_template = TEMPLATE
    turns = FORMS[name]
    row = Row(where="", domain="all", messages=(*turns, {"role": "assistant", "content": "hello"}))
    encoded = Encoder(other, ChatTemplate.of(other), 200).encode([row]).rows[0]
    found = asked(other, turns)
    assert torch.equal(encoded.input_ids[: len(found.ids)].long(), found.ids)
    before = earlier_answers(other, found)
    assert before is not None and torch.equal(before, encoded.is_label[: len(found.ids)])


@pytest.mark.parametrize("model", list(OF_MODEL), indirect=True)
def test_a_conversation_is_decided_alike_with_beams_without_a_cache_and_with_candidates(model, tokenizer):
    ids = prompt_ids(tokenizer, TURNS)
    before = earlier_answers(tokenizer, asked(tokenizer, TURNS))
    assert before is not None
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    with conversations(model, before[None], torch.ones_like(ids, dtype=torch.bool)):
        plain = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, use_cache=False, **options), plain)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **options), plain)
        two = model.generate(ids, num_beams=2, **options)
        assert torch.equal(model.generate(ids, num_beams=2, use_cache=False, **options), two)


TURNWISE = [name for name, moe in OF_MODEL.items() if moe["decide"] == "turn"]


@pytest.mark.parametrize("model", TURNWISE, indirect=True)
def test_a_turn_more_on_a_cache_is_decided_as_in_the_whole_conversation(model):
    """The cache holds all of the first answer, so that the new tokens are the turn."""
    how = {"max_new_tokens": NEW, "do_sample": False}
    first, second = torch.arange(20, 27)[None], torch.arange(40, 45)[None].repeat(1, 2)
    with torch.no_grad():
        answered = model.generate(first, return_dict_in_generate=True, **how)
        cache = model(answered.sequences[:, -1:], past_key_values=answered.past_key_values).past_key_values
        whole = torch.cat([answered.sequences, second], 1)
        assert cache.get_seq_length() == answered.sequences.shape[1]
        found = model.generate(whole, past_key_values=cache, **how)
        before = torch.zeros_like(whole, dtype=torch.bool)
        before[:, first.shape[1] : answered.sequences.shape[1]] = True
        with conversations(model, before, torch.ones_like(before)):
            expected = model.generate(whole, **how)
    assert torch.equal(found, expected)
