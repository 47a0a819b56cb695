"""What silencing does: beside a slow reference, beside the base, and with an expert of which all is known."""

import pytest
import torch

import lmoe
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow
from lmoe.errors import ConfigError, DataError
from lmoe.explain.explain import Explainer, explain_text
from lmoe.explain.numbers import Work
from lmoe.explain.texts import of_encoded
from lmoe.generate.conversation import prompt_ids
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected, sites
from lmoe.ops.linear_sizes import sizes
from lmoe.pretrain.bpe import train_bpe
from lmoe.rules.routers import needs_domain, needs_prompt
from lmoe.vocabulary import TrainOn
from tests.explain.explained import numbers_of, text
from tests.injection.tiny_injected import ROUTERS, tiny_injected
from tests.reference.dumb_explain import text_change, token_change
from tests.tiny_models import randomise, tiny_model, tokens

ALONE = {"attn_lora": {"enabled": False}}
"""No other LoRA beside the routed experts."""
KINDS = [
    *((router, {}) for router in ROUTERS),
    ("top_k", {"router_scope": "block"}),
    ("sequence", {"router_scope": "model"}),
    ("sequence", {"router_scope": "model", "prompt_experts": True}),
    ("oracle", {"router_scope": "model"}),
]


def a_tokenizer():
    """Of 290 tokens, with a chat template."""
    return train_bpe(["What is red? red is a colour."] * 3, 290, 64)


@pytest.mark.parametrize(("router", "moe"), KINDS, ids=lambda value: str(value))
def test_all_silenced_is_the_base_and_a_token_alone_is_what_a_forward_of_all_tokens_says(
    router: str, moe: dict
) -> None:
    model = tiny_injected(router, injection=ALONE, moe=moe)
    section = injected(model).moe
    of = text(domain="maths" if needs_domain(section) else None)
    found = numbers_of(model, of)
    torch.testing.assert_close(found.none, found.base, atol=1e-5, rtol=0, equal_nan=True)
    assert found.mixture[:1].isnan().all() and found.mixture[1:].isfinite().all()
    prompt = of.prompts(of_all_turns=False, openings=True)[None] if needs_prompt(section) else None
    silent_prompt = section.router_scope == "model" and not section.prompt_experts
    for token, expert in ((2, 0), (3, 1), (5, 0), (6, 1)):
        if silent_prompt and token <= 3:
            assert found.token[token, expert] == 0  # no expert acts where it is predicted
            continue
        dumb = token_change(model, of.ids[None], token, expert, domain=of.domain, prompt=prompt)
        assert float(found.token[token, expert]) == pytest.approx(dumb, abs=1e-4), (token, expert)
    if not (needs_prompt(section) or needs_domain(section)):
        assert float(found.text[5, 1]) == pytest.approx(text_change(model, of.ids[None], 5, 1), abs=1e-4)
    assert float(found.text[1:].abs().max()) > 0.01 and float(found.token[1:].abs().max()) > 0.01


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "qwen3_5_text"])
def test_windows_and_linear_attention_have_the_same_numbers_as_a_forward_of_all_tokens(family: str) -> None:
    changes = {"sliding_window": 4} if family != "qwen3_5_text" else {}
    model, of = tiny_injected(family=family, **changes), text()
    found = numbers_of(model, of)
    for token, expert in ((2, 0), (6, 1)):
        dumb = token_change(model, of.ids[None], token, expert, domain=None, prompt=None)
        assert float(found.token[token, expert]) == pytest.approx(dumb, abs=1e-4)


@pytest.mark.parametrize(
    ("strategy", "family"), [("moe_expert_lora", "qwen3"), ("native_moe_expert_lora", "qwen3_moe")]
)
def test_experts_that_are_whole_blocks_have_the_same_numbers_as_a_forward_of_all_tokens(strategy, family) -> None:
    model, of = tiny_injected(family=family, injection={"strategy": strategy}), text()
    found = numbers_of(model, of)
    for token, expert in ((2, 0), (6, 1)):
        dumb = token_change(model, of.ids[None], token, expert, domain=None, prompt=None)
        assert float(found.token[token, expert]) == pytest.approx(dumb, abs=1e-4)


def test_one_adapter_is_the_only_expert_and_silencing_it_leaves_the_base() -> None:
    model = tiny_model()
    lmoe.inject(model, {"strategy": "dense_lora", "lora_r": 4})
    randomise(model)
    found = numbers_of(model, text())
    torch.testing.assert_close(found.mixture + found.text[:, 0], found.base, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(found.none.nan_to_num(), found.base.nan_to_num())
    assert all((weights == 1).all() for weights in found.weights.values()) and found.token[1:].abs().min() > 0


def test_more_experts_than_rows_of_a_step_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, of = tiny_injected("soft"), text(5)
    together = numbers_of(model, of).token
    monkeypatch.setattr("lmoe.explain.numbers.ROWS_AT_ONCE", 3)
    torch.testing.assert_close(numbers_of(model, of).token, together, atol=1e-5, rtol=0, equal_nan=True)


def test_routing_weights_are_those_of_a_trace() -> None:
    model, of = tiny_injected(), text()
    found = numbers_of(model, of)
    with lmoe.trace(model, attention_mask=torch.ones(1, len(of))) as trace:
        model(input_ids=of.ids[None])
    assert found.weights.keys() == trace.routing.keys()
    for site, routing in trace.routing.items():
        torch.testing.assert_close(found.weights[site], routing.routing_weights[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("router", "moe"),
    [
        ("sequence", {"router_scope": "model"}),
        ("sequence", {"router_scope": "model", "prompt_experts": True}),
        ("sequence", {"router_scope": "model", "decide": "turn"}),
        ("sequence", {}),
        ("prompt_hash", {}),
    ],
    ids=str,
)
def test_a_plain_text_is_explained_with_the_experts_that_training_gives_it(router: str, moe: dict) -> None:
    """And a forward with labels, whatever stands for its prompt."""
    model, tokenizer = tiny_injected(router, moe=moe, std=0.5, vocab_size=290), a_tokenizer()
    record, others = injected(model), 0
    for number in range(8):
        ids = tokens(1, 20, seed=number)[0]
        row = EncodedRow(ids.int(), torch.ones(20, dtype=torch.bool), 0)
        weights = numbers_of(model, of_encoded(tokenizer, row, name="a text", domain="all")).weights
        batch = Collate(pad_token_id=0, max_length=64, packed=False)([row])
        batch = {name: tensor[..., :20] for name, tensor in batch.items()}
        with torch.no_grad(), batch_info(record, batch, ["all"]), record.trace.recording(batch["valid_mask"]) as seen:
            model(input_ids=ids[None])
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones(1, 20)) as labelled:
            model(input_ids=ids[None], labels=ids[None])
        for site, found in weights.items():
            for trace in (seen, labelled):
                expected = trace.routing[site].acting_weights[0]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        alone = torch.arange(20)[None] < 1
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones(1, 20), prompt_mask=alone) as first:
            model(input_ids=ids[None])
        others += not torch.allclose(first.routing[site].acting_weights[0, -1], found[-1], atol=1e-3)
    assert bool(others) == (router == "prompt_hash" or "router_scope" in moe), "the opening decides as the first token"


def test_an_expert_that_alone_knows_a_word_gets_the_blame_for_it() -> None:
    """Experts compute nothing but one at the last Linear, which answers one hidden state with the word's own row of the
    output layer."""
    model, of, knows, token = tiny_model(), text(), 2, 5
    lmoe.inject(model, {"lora_r": 4, **ALONE}, {"router": "soft"})
    word = int(of.ids[token])
    path, site = list(sites(model))[-1]
    seen = []
    hook = site.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=of.ids[None])
        hook.remove()
        x = seen[0][0, token - 1]
        direction = model.lm_head.weight[word]
        site.lora_A[knows] = 0
        site.lora_A[knows, 0] = x / x.square().sum()
        site.lora_B[knows, :, 0] = 40 * direction / direction.norm()
    assert path.endswith("down_proj") and sizes(site.base_layer)[1] == len(direction)
    found = numbers_of(model, of)
    for changes in (found.text, found.token):
        assert changes[1:, [e for e in range(4) if e != knows]].abs().max() < 1e-5
        assert int(changes[1:, knows].argmin()) + 1 == token and changes[token, knows] < -1
    assert found.mixture[token] > found.base[token] + 1


def test_a_blend_is_explained_by_its_weights(tmp_path) -> None:
    from lmoe.blend.blend import Blend
    from tests.peft_experts import three

    base = tiny_model()
    places, of = three(base, tmp_path), text()
    with Blend(base, places, {"code": 0.5, "chat": -0.3, "sql": 0.0}) as blend:
        found = numbers_of(base, of)
        torch.testing.assert_close(found.none, found.base, atol=1e-5, rtol=0, equal_nan=True)
        with blend.using({"code": 0.5}):
            alone = numbers_of(base, of).mixture
        torch.testing.assert_close(found.mixture + found.text[:, 1], alone, atol=1e-5, rtol=0, equal_nan=True)
        assert (found.text[1:, 2] == 0).all() and (found.token[1:, 2] == 0).all()
        # At the first position a token alone is the whole text.
        torch.testing.assert_close(found.token[1], found.text[1], atol=1e-4, rtol=0)
        without = [path for path in blend.sites if path not in blend.branches["chat"]]
        assert without and all((found.weights[path][:, 1] == 0).all() for path in without)


def test_a_blend_that_decides_by_itself_is_refused(tmp_path) -> None:
    from lmoe.blend.blend import Blend
    from lmoe.errors import ConfigError
    from tests.peft_experts import three

    base = tiny_model()
    with Blend(base, three(base, tmp_path), router="arrow"), pytest.raises(ConfigError, match="decides by itself"):
        numbers_of(base, text())


def test_the_model_computes_as_before_afterwards() -> None:
    model, of = tiny_injected("sequence", moe={"router_scope": "model"}), text()
    with torch.no_grad():
        before = model(input_ids=of.ids[None], labels=of.ids[None]).logits
        numbers_of(model, of)
        assert torch.equal(model(input_ids=of.ids[None], labels=of.ids[None]).logits, before)


def test_a_text_is_explained_from_python_with_its_answer_and_its_cost_is_known() -> None:
    tokenizer = a_tokenizer()
    model = tiny_injected(vocab_size=290, eos_token_id=None)
    model.train()
    found = lmoe.explain_text(model, tokenizer, "What is red?", max_new_tokens=3)
    [one] = found.texts
    assert model.training and int(one.tokens.answer.sum()) == 3 and "What is red?" in "".join(one.tokens.texts)
    work = Work.of([one.tokens], 4)
    length = len(one.tokens)
    assert work.total == length * 7 + (length - 1) * 5
    with pytest.raises(lmoe.errors.DataError, match="at most 4 are explained"):
        explain_text(model, tokenizer, "What is red?", max_tokens=4)


def test_what_the_context_does_not_hold_is_not_explained() -> None:
    tokenizer = a_tokenizer()
    length = prompt_ids(tokenizer, "What is red?").shape[1]
    short, whole = (tiny_injected(vocab_size=290, max_position_embeddings=n) for n in (length - 1, length))
    refused = f"the prompt has {length} tokens; the backbone's context holds"
    for new in (0, 4):
        with pytest.raises(DataError, match=f"{refused} {length - 1}. Shorten it"):
            explain_text(short, tokenizer, "What is red?", max_new_tokens=new)
    with pytest.raises(DataError, match=f"{refused} {length}. Shorten it"):
        explain_text(whole, tokenizer, "What is red?", max_new_tokens=1)
    found = explain_text(whole, tokenizer, "What is red?", max_new_tokens=0)
    assert len(found.texts[0].tokens) == length
    with pytest.raises(DataError, match=rf"prompt has {length} tokens; the backbone's context holds {length - 1}"):
        Explainer(short).explain([text.tokens for text in found.texts])  # of another model


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], "the prompt is empty"),
        ([{"role": "user"}], r"the prompt: messages\[0\] has no content"),
        ([{"content": "red"}], r"the prompt: messages\[0\].role is null; allowed"),
        ([{"role": "user", "content": 3}], r"the prompt: messages\[0\].content must be text, got 3"),
        (["red"], r"the prompt: messages\[0\] must be an object with role and content"),
    ],
)
@pytest.mark.parametrize("template", [True, False])
def test_a_conversation_that_is_none_is_refused_in_words(conversation: list, words: str, *, template: bool) -> None:
    tokenizer = a_tokenizer()
    if not template:
        tokenizer.chat_template = None
    with pytest.raises(DataError, match=words):
        explain_text(tiny_model(vocab_size=290), tokenizer, conversation)


def test_explaining_leaves_the_random_numbers_of_the_process_alone() -> None:
    before = torch.get_rng_state()
    explain_text(tiny_model(vocab_size=290), a_tokenizer(), "What is red?", max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_earlier_answers_are_a_part_of_the_prompt_where_only_the_last_was_learnt() -> None:
    turns = [
        {"role": "user", "content": "What is red?"},
        {"role": "assistant", "content": "red is a colour."},
        {"role": "user", "content": "red?"},
    ]
    moe = {"router_scope": "model", "prompt_experts": True}
    model, tokenizer = tiny_injected("sequence", moe=moe, vocab_size=290, std=0.5), a_tokenizer()

    def explained_as(**learnt) -> tuple[int, torch.Tensor]:
        [found] = explain_text(model, tokenizer, turns, max_new_tokens=0, **learnt).texts
        return int(found.tokens.answer.sum()), found.weights["model"][-1]

    answered, weights = explained_as()
    assert answered > 0 and torch.equal(explained_as(train_on="assistant")[1], weights)
    ids = prompt_ids(tokenizer, turns)
    with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        model(input_ids=ids)
    for learnt in ("last", TrainOn.all):
        none, whole = explained_as(train_on=learnt)
        assert none == 0 and not torch.allclose(whole, weights)
        torch.testing.assert_close(whole, trace.routing["model"].routing_weights[0, -1], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="train_on='first'; allowed: assistant, last, all"):
        explained_as(train_on="first")
