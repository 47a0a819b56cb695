"""Every router and every kind of blend answers alike however it is called, or refuses by name.

Plain greedy generation is the reference: one row a sequence, a KV cache, the prompt in one forward.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

import lmoe
from lmoe.errors import LmoeError, RoutingError
from lmoe.generate.batches import BatchAnswers
from lmoe.generate.generate import Sampling, continue_ids
from lmoe.injection.tracing import domain
from lmoe.peft.experts import save_peft_experts
from lmoe.peft.router_head import write_head
from lmoe.pretrain.bpe import train_bpe
from tests.generate.near_ties import part_at_a_near_tie
from tests.injection.tiny_injected import BY_DOMAIN, DOMAINS, ROUTERS, tiny_injected
from tests.peft_experts import three
from tests.tiny_models import randomise, tiny_model, tokens

VOCAB = 300
TEXTS = {"code": ["a = b", "c = d + a"], "chat": ["hello to you", "you say hello"], "sql": ["select a", "from b"]}
BLENDS = ["fixed", "by_row", "arrow", "encoder", "head"]
OF_MODEL = {
    "sequence model": {"router_scope": "model"},
    "sequence model on prompts": {"router_scope": "model", "prompt_experts": True},
}
BY_PROMPT = ("sequence", "sequence block", "prompt_hash", *OF_MODEL, "encoder", "head")
NAMES = [*ROUTERS, "sequence block", "top_k block", *OF_MODEL, *BLENDS]
LENGTH, NEW = 7, 6


@dataclass(slots=True)
class Mixed:
    """A model with a mixture, and what its calls need around them."""

    model: torch.nn.Module
    blend: "lmoe.Blend | None" = None
    about: Callable[[], AbstractContextManager] = nullcontext

    def answers(self, ids: Tensor, **options) -> Tensor:
        with self.about():
            out = self.model.generate(
                ids, **{"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | options
            )
        return out[:, ids.shape[1] :]

    def forward(self, ids: Tensor, **options):
        with torch.no_grad(), self.about():
            return self.model(input_ids=ids, **options)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tiny_model(vocab_size=VOCAB)
    tokenizer = train_bpe([" ".join(text for texts in TEXTS.values() for text in texts)], VOCAB, 64)
    trained, folder = copy.deepcopy(base), tmp_path_factory.mktemp("of a run")
    injection = {"lora_r": 4, "num_experts": 3, "attn_lora": {"enabled": False}}
    lmoe.inject(trained, injection, {"router": "sequence", "router_scope": "model"})
    randomise(trained, std=0.5)
    of_run = save_peft_experts(trained, folder, base_model="tiny")
    write_head(trained, folder, list(of_run))
    return base, three(base, tmp_path_factory.mktemp("experts")), tokenizer, of_run


@pytest.fixture(scope="module", params=NAMES)
def mixed(request, places) -> tuple[str, Mixed]:
    return request.param, made(request.param, places)


def made(name: str, places) -> Mixed:
    """A fresh one; sharp, so that another decision gives another answer."""
    base, experts, tokenizer, of_run = places
    if name not in BLENDS:
        router, _, scope = name.partition(" ")
        model = tiny_injected(router, moe=OF_MODEL.get(name, {"router_scope": scope or "linear"}), std=0.5)
        model.generation_config.eos_token_id = None
        return Mixed(model, about=(lambda: domain(model, DOMAINS[0])) if router in BY_DOMAIN else nullcontext)
    model = copy.deepcopy(base)
    model.generation_config.eos_token_id = None
    if name == "head":
        return Mixed(model, lmoe.Blend(model, of_run, router="encoder", head=of_run["expert0"].parent))
    weights = {"fixed": {"code": 1.5, "sql": -2.0}, "by_row": [{"code": 2.0, "chat": -1.0}, {"sql": 3.0}]}.get(name)
    router = name if name in ("arrow", "encoder") else "weighted"
    sharp = {"temperature": 0.02} if name == "encoder" else {}
    blend = lmoe.Blend(model, experts, weights, router, **sharp)
    if name == "encoder":
        blend.fit_centroids(TEXTS, tokenizer)
    return Mixed(model, blend)


def rows() -> Tensor:
    return tokens(2, LENGTH, seed=11)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("no cache", {"use_cache": False}),
        ("static cache", {"cache_implementation": "static", "disable_compile": True}),
        ("chunked prefill", {"prefill_chunk_size": LENGTH - 1}),
    ],
)
def test_a_way_of_generating_gives_the_tokens_of_plain_greedy_or_is_refused(mixed, way, options):
    name, one = mixed
    ids, expected = rows(), one.answers(rows())
    if way == "chunked prefill" and name in BY_PROMPT:
        with pytest.raises(RoutingError, match="the prompt of 7 tokens comes in pieces.*leave prefill_chunk_size out"):
            one.answers(ids, **options)
    else:
        assert torch.equal(one.answers(ids, **options), expected)


@pytest.mark.parametrize("mixed", BY_PROMPT, indirect=True)
def test_in_training_mode_the_decision_for_the_prompt_stands_too(mixed):
    """Nothing is drawn by these models; a forward that trains leaves no decision with a cache."""
    one, expected = mixed[1], mixed[1].answers(rows())
    one.model.train()
    try:
        assert torch.equal(one.answers(rows()), expected)
    finally:
        one.model.eval()


@pytest.mark.parametrize("mixed", BY_PROMPT, indirect=True)
def test_a_padded_prompt_is_read_alike_as_embeddings_and_under_a_mask_of_queries_and_keys(mixed):
    one, mask = mixed[1], torch.ones_like(rows())
    mask[0, :3] = 0
    expected = one.answers(rows(), attention_mask=mask)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(one.answers(rows(), attention_mask=mask, **static), expected)
    embedded = one.model.get_input_embeddings()(rows())
    if mixed[0] == "prompt_hash":
        with pytest.raises(RoutingError, match="with input_ids in place of inputs_embeds"):
            one.model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=NEW)
        return
    with torch.no_grad():
        found = one.model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("moe", OF_MODEL.values(), ids=OF_MODEL)
def test_a_mask_for_each_kind_of_layer_tells_a_router_of_the_model_the_padding(moe):
    """Sliding and full attention over a cache of a fixed size."""
    model = tiny_model("gemma3_text")
    lmoe.inject(model, {"lora_r": 4}, {"router": "sequence", **moe})
    randomise(model, std=0.5)
    model.generation_config.eos_token_id = None
    one, mask = Mixed(model), torch.ones_like(rows())
    mask[0, :3] = 0
    expected = one.answers(rows(), attention_mask=mask)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(one.answers(rows(), attention_mask=mask, **static), expected)


def test_candidates_of_an_assistant_are_not_taken_for_the_prompt(mixed):
    name, one = mixed
    ids = rows()[:1]
    if name == "by_row":  # assisted decoding takes one row
        one = Mixed(one.model, one.blend, lambda blend=one.blend: blend.using([{"code": 2.0, "chat": -1.0}]))
    expected = one.answers(ids)
    assistant = tiny_model(seed=3, vocab_size=one.model.config.vocab_size)
    assistant.generation_config.eos_token_id = None
    assert torch.equal(one.answers(ids, assistant_model=assistant), expected)
    again = torch.cat([ids, ids], 1)
    assert torch.equal(one.answers(again, prompt_lookup_num_tokens=3), one.answers(again))


def test_beams_give_the_same_with_and_without_a_cache(mixed):
    name, one = mixed
    if name == "by_row":
        with pytest.raises(LmoeError, match=r"the batch has 4 rows, and blend\.weights were set for 2"):
            one.answers(rows(), num_beams=2)
        return
    options = {"num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(one.answers(rows(), **options), one.answers(rows(), use_cache=False, **options))


def test_two_conversations_on_one_model_keep_apart(mixed):
    one = mixed[1]
    a, b, after = rows(), tokens(2, 5, seed=4), tokens(2, 1, seed=5)
    expected = one.forward(after, past_key_values=one.forward(a, use_cache=True).past_key_values).logits
    first = one.forward(a, use_cache=True).past_key_values
    copied = copy.deepcopy(first)
    one.forward(b, use_cache=True)
    assert torch.equal(one.forward(after, past_key_values=first).logits, expected)
    one.forward(b)
    assert torch.equal(one.forward(after, past_key_values=copied).logits, expected)


def test_a_turn_more_goes_on_with_the_decision_of_the_first_prompt(mixed):
    one = mixed[1]
    ids = rows()
    cache = one.forward(ids, use_cache=True).past_key_values
    whole = torch.cat([ids, tokens(2, 3, seed=6)], 1)
    by_hand = one.forward(whole[:, LENGTH:], past_key_values=copy.deepcopy(cache)).logits[:, -1].argmax(-1)
    assert torch.equal(one.answers(whole, past_key_values=cache)[:, 0], by_hand)


def test_a_prompt_in_every_thread_gets_the_answer_that_it_gets_alone(mixed):
    one = mixed[1]
    prompts = [tokens(2, length, seed=length) for length in (4, 5, 6)]
    expected, wrong = [one.answers(ids) for ids in prompts], []

    def work(ids: Tensor, answer: Tensor) -> None:
        try:
            wrong.extend(1 for _ in range(4) if not torch.equal(one.answers(ids), answer))
        except BaseException as error:
            wrong.append(error)

    in_threads([(work, ids, answer) for ids, answer in zip(prompts, expected, strict=True)])
    assert wrong == []


@pytest.mark.parametrize("mixed", ["top_k", "oracle", *BY_PROMPT, *BLENDS[:3]], indirect=True)
def test_continuous_batching_gives_each_request_its_own_answer_or_an_error(mixed):
    name, one = mixed
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (4, 6)]
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    few = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    before = one.model.config._attn_implementation
    try:
        with one.about():
            found = one.model.generate_batch(
                prompts, generation_config=settings, continuous_batching_config=few, progress_bar=False
            )
    finally:
        one.model.set_attn_implementation(before)
    results = list(found.values())
    assert len(results) == 2
    if name in BY_PROMPT:
        assert all("rows that lie one behind the other" in result.error for result in results)
    elif name == "oracle":  # its thread is another one than that of the block
        assert all("does not know the domain of these tokens" in result.error for result in results)
    elif name == "by_row":
        assert all("weights were set for 2" in result.error for result in results)
    else:
        for prompt, result in zip(prompts, results, strict=True):
            expected = one.answers(torch.tensor([prompt]), max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
            assert result.error is None and result.generated_tokens == expected[0].tolist()


def test_a_copy_and_a_pickle_answer_alike_and_are_mixtures_of_their_own(mixed):
    name, one = mixed
    ids, expected = rows(), one.answers(rows())
    for model in (copy.deepcopy(one.model), pickle.loads(pickle.dumps(one.model))):
        other = Mixed(model, about=(lambda m=model: domain(m, DOMAINS[0])) if name == "oracle" else nullcontext)
        assert torch.equal(other.answers(ids), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(one.answers(ids), expected)


def in_threads(calls: list[tuple]) -> None:
    threads = [threading.Thread(target=call, args=args) for call, *args in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("mixed", BY_PROMPT, indirect=True)
def test_another_prompt_that_is_read_inside_generate_is_its_own(mixed):
    """Classifier-free guidance: the answer is that of a loop that reads both prompts by itself."""
    one, ids, negative = mixed[1], rows()[:1], tokens(1, 10, seed=8)
    found = one.answers(ids, guidance_scale=3.0, negative_prompt_ids=negative, max_new_tokens=3)
    caches, inputs, expected = [None, None], [ids, negative], []
    for _ in range(3):
        scores = []
        for number in (0, 1):
            out = one.forward(inputs[number], past_key_values=caches[number], use_cache=True)
            caches[number] = out.past_key_values
            scores.append(out.logits[:, -1].log_softmax(-1))
        token = (3.0 * (scores[0] - scores[1]) + scores[1]).argmax(-1)
        expected.append(int(token))
        inputs = [token[None], token[None]]
    assert found[0].tolist() == expected


def test_a_compiled_model_reads_the_prompt_too(places):
    one = made("encoder", places)
    ids, other = rows(), tokens(2, LENGTH, seed=3)
    expected = [one.forward(prompt, use_cache=False).logits for prompt in (ids, other)]
    compiled = torch.compile(one.model, backend="eager")
    with torch.no_grad():
        for prompt, logits in zip((ids, other), expected, strict=True):
            torch.testing.assert_close(compiled(input_ids=prompt, use_cache=False).logits, logits)
    torch.compiler.reset()


@pytest.mark.parametrize("mixed", BY_PROMPT, indirect=True)
def test_rows_that_lie_one_behind_the_other_are_refused_by_their_positions(mixed):
    ids, positions = rows()[:1], torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with pytest.raises(RoutingError, match="position_ids begin anew inside a sequence"):
        mixed[1].forward(ids, position_ids=positions)


ROWS = [tokens(1, length, seed=length)[0] for length in (3, 12, 5, 1, 9)]


def test_an_answer_in_a_padded_batch_is_that_of_its_row_alone(mixed, places):
    """Of every router and every kind of blend, but for near-ties of the two likeliest tokens."""
    name, one = mixed
    answering = BatchAnswers(model=one.model, tokenizer=places[2], sampling=Sampling(max_new_tokens=NEW))
    domains = [DOMAINS[number % 2] for number in range(len(ROWS))] if name in BY_DOMAIN else None
    if name == "by_row":
        with pytest.raises(LmoeError, match=r"the batch has 5 rows, and blend\.weights were set for 2"):
            answering.answer(ROWS, numbers=range(5))
        return
    found = answering.answer(ROWS, numbers=range(5), domains=domains)
    near_ties = 0
    for number, (prompt, answer) in enumerate(zip(ROWS, found, strict=True)):
        with nullcontext() if domains is None else domain(one.model, domains[number]):
            alone = continue_ids(one.model, places[2], prompt[None], answering.sampling)
            if not torch.equal(answer.ids, alone):
                assert part_at_a_near_tie(one.model, prompt, answer.ids, alone)
                near_ties += 1
    assert near_ties <= 1
