"""Answers: with a cache as without, streamed as returned, whatever the prompt."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lmoe.errors import BackboneError, ConfigError, DataError
from lmoe.generate.conversation import asked, prompt_ids
from lmoe.generate.generate import Sampling, stream_answer
from lmoe.pretrain.bpe import train_bpe
from tests.conftest import CONTEXT, VOCAB

SETTINGS = {"max_new_tokens": 12}


def answer(trained, prompt: str, **changes) -> tuple[str, list[str]]:
    """The whole answer and its pieces."""
    pieces: list[str] = []
    sampling = Sampling(**(SETTINGS | changes))
    text = stream_answer(trained.model.eval(), trained.tokenizer, prompt, sampling, pieces.append)
    return text, pieces


def test_the_answer_is_that_of_greedy_decoding_without_a_cache(trained):
    """Token by token, the whole sequence anew each time."""
    model, tokenizer = trained.model.eval(), trained.tokenizer
    ids = prompt_ids(tokenizer, "hello")
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
            if best.item() == tokenizer.eos_token_id:
                break
    assert answer(trained, "hello")[0] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["it's a, b = {c}!", "ünïcödé 漢字 🙂", "line\nbreak\ttab", "${oc.env:HOME} %s {0}"])
def test_a_prompt_is_taken_as_it_is(trained, prompt):
    text, pieces = answer(trained, prompt)
    assert "".join(pieces) == text
    assert prompt in trained.tokenizer.decode(prompt_ids(trained.tokenizer, prompt)[0])


def test_a_prompt_is_one_user_turn_and_the_start_of_an_answer(trained):
    text = trained.tokenizer.decode(prompt_ids(trained.tokenizer, "hello")[0])
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_template_takes_the_bare_prompt():
    tokenizer = train_bpe(["hello hello"], VOCAB, CONTEXT)
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_ids(tokenizer, "hello")[0]) == "hello"


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_tools_reach_the_template_and_one_that_fails_of_them_is_refused_in_words():
    tokenizer, turns = train_bpe(["hello hello"], VOCAB, CONTEXT), [{"role": "user", "content": "hello"}]
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    )
    assert tokenizer.decode(asked(tokenizer, turns, [TOOL]).ids) == "look hello"
    assert tokenizer.decode(prompt_ids(tokenizer, turns)[0]) == "hello"
    tokenizer.chat_template = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}{{ messages[0].content }}"
    with pytest.raises(DataError, match="refuses this conversation.*no tools here"):
        asked(tokenizer, turns, [TOOL])
    tokenizer.chat_template = "{% for _ in range(tools | length * 99999) %}{{ '-' * 9999 }}{% endfor %}"
    with pytest.raises(DataError, match="refuses this conversation.*writes more than"):
        asked(tokenizer, turns, [TOOL])
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match="shows the model no tools"):
        asked(tokenizer, turns, [TOOL])
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].function.name }}"}
    assert tokenizer.decode(asked(tokenizer, turns, [TOOL]).ids) == "look"
    assert tokenizer.decode(prompt_ids(tokenizer, turns)[0]) == "hello"
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="tools cannot be shown.*no chat template"):
        asked(tokenizer, turns, [TOOL])


def test_a_prompt_that_leaves_no_room_says_how_long_it_is(trained):
    with pytest.raises(DataError, match=rf"the prompt has \d+ tokens; the backbone's context holds {CONTEXT}"):
        answer(trained, "hello " * CONTEXT)


def test_an_answer_ends_where_the_context_does(trained):
    prompt = "a" * (CONTEXT - 30)
    used = prompt_ids(trained.tokenizer, prompt).shape[1]
    assert used < CONTEXT
    text, _ = answer(trained, prompt, max_new_tokens=1000)
    assert text == answer(trained, prompt, max_new_tokens=CONTEXT - used)[0]


def test_sampling_follows_its_seed(trained):
    sample = {"temperature": 2.0, "top_p": 0.95}
    texts = {seed: answer(trained, "hello", seed=seed, **sample)[0] for seed in (1, 2, 3)}
    assert len(set(texts.values())) > 1
    assert answer(trained, "hello", seed=2, **sample)[0] == texts[2]


def test_an_answer_is_drawn_as_by_the_generator_of_the_process_which_is_left_as_it_was(trained):
    """Also by threads, which share that generator, and where an answer fails on its way."""
    sample, expected = {"temperature": 2.0, "top_p": 0.95, "top_k": 0}, {}
    ids = prompt_ids(trained.tokenizer, "hello")
    for seed in (1, -3, 2**64 - 1):
        torch.manual_seed(seed)
        out = trained.model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, **SETTINGS, **sample
        )
        expected[seed] = trained.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda seed: answer(trained, "hello", seed=seed, **sample)[0], expected)
    assert dict(zip(expected, found, strict=True)) == expected
    with pytest.raises(ZeroDivisionError):
        stream_answer(trained.model, trained.tokenizer, "hello", Sampling(temperature=1.0), lambda piece: 1 / 0)
    answer(trained, "hello")  # the likeliest tokens draw nothing
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_p": 0.9}, "top_p=0.9 has no effect at temperature=0"),
        ({"top_k": 5, "seed": 1}, "top_k=5 has no effect.*seed=1 has no effect"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0, or 1e-06 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be 0, or 1e-06 or more"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p=2.0 must be above 0, at most 1"),
        ({"max_new_tokens": 0, "repetition_penalty": 0.0}, "max_new_tokens=0 must.*repetition_penalty=0.0 must be"),
    ],
)
def test_sampling_that_cannot_be_or_has_no_effect_is_refused(given, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        Sampling(**given)


def test_scores_that_are_no_numbers_are_told_where_tokens_are_drawn(trained, monkeypatch):
    head = trained.model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda hidden: torch.full((*hidden.shape[:-1], VOCAB), float("nan")))
    with pytest.raises(BackboneError, match="scores are no numbers"):
        answer(trained, "hello", temperature=1.0)
