"""Arrow routes each token, the encoder each prompt: against a loop, and with the cache."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import DynamicCache

import lmoe
from lmoe.errors import BlendError
from lmoe.peft.reader import read_expert
from lmoe.pretrain.bpe import train_bpe
from tests.peft_experts import logits, three, write_peft
from tests.reference.dumb_arrow import dumb_arrow
from tests.tiny_models import tiny_model, tokens

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TEXTS = {"code": ["a = b", "c = d + a"], "chat": ["hello to you", "you say hello"]}


@pytest.fixture(scope="module")
def base():
    return tiny_model(vocab_size=300)


@pytest.fixture
def places(base, tmp_path):
    return three(base, tmp_path / "experts")


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_equals_a_loop_over_experts_and_tokens_at_every_site(base, model, places, top_k):
    blend = lmoe.Blend(model, places, router="arrow", top_k=top_k, temperature=0.7)
    experts = [read_expert(place) for place in places.values()]
    assert len(blend.sites) == 14
    for path in blend.sites:
        x = torch.randn(2, 3, base.get_submodule(path).in_features)
        branches = [expert.branches.get(path) for expert in experts]
        plain = [None if b is None else (b.lora_A, b.lora_B, b.scaling) for b in branches]
        with torch.no_grad():
            found = model.get_submodule(path)(x) - base.get_submodule(path)(x)
            assert_close(found.flatten(0, 1), dumb_arrow(x.flatten(0, 1), plain, top_k, 0.7)[0], **CLOSE)


def test_one_expert_under_arrow_is_that_expert(base, model, places):
    blend = lmoe.Blend(model, {"code": places["code"]}, router="arrow")
    alone = copy.deepcopy(base)
    lmoe.Blend(alone, {"code": places["code"]})
    assert_close(logits(model, tokens()), logits(alone, tokens()), **CLOSE)
    for refused in (lambda: setattr(blend, "weights", {}), lambda: blend.weights):
        with pytest.raises(BlendError, match="router=arrow weighs every token"):
            refused()
    with pytest.raises(BlendError, match="cannot fold a blend whose weights differ by token"):
        blend.fold()


def test_what_arrow_gives_each_expert_can_be_seen(base, model, places):
    blend = lmoe.Blend(model, places, router="arrow", top_k=2)
    experts, inputs = [read_expert(place) for place in places.values()], {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
        for path in blend.sites
    ]
    with blend.watched() as shares:
        seen = logits(model, tokens())
        assert shares == {}
    for hook in hooks:
        hook.remove()
    total = torch.zeros(len(experts))
    for path, x in inputs.items():
        branches = [expert.branches.get(path) for expert in experts]
        plain = [None if b is None else (b.lora_A, b.lora_B, b.scaling) for b in branches]
        total += dumb_arrow(x.flatten(0, 1), plain, 2, 1.0)[1].sum(0)
    assert list(shares) == list(places)
    assert_close(torch.tensor(list(shares.values())), total / total.sum(), **CLOSE)
    assert torch.equal(logits(model, tokens()), seen)
    blend.close()
    weighted = lmoe.Blend(model, places)
    with pytest.raises(BlendError, match=r"only router=arrow weighs by token; read blend\.weights"), weighted.watched():
        pass


def test_what_tokens_were_given_has_the_names_of_their_forward_though_the_experts_change_before_it_is_read(
    model, places
):
    blend = lmoe.Blend(model, {"code": places["code"], "chat": places["chat"]}, router="arrow")
    with blend.watched_by_token(tokens().numel()) as seen:
        logits(model, tokens())
        before = seen()
        blend.remove("code")
        without = seen()
        blend.add("sql", places["sql"])
        after = seen()
    assert list(before) == list(without) == list(after) == ["code", "chat"]
    for name, weights in before.items():
        assert torch.equal(without[name], weights) and torch.equal(after[name], weights)


def test_arrow_follows_experts_that_come_and_go_and_generates_with_a_cache(base, model, places):
    blend = lmoe.Blend(model, {"code": places["code"], "chat": places["chat"]}, router="arrow", top_k=2)
    before = logits(model, tokens())
    blend.add("sql", places["sql"])
    assert not torch.equal(logits(model, tokens()), before)
    fresh = copy.deepcopy(base)
    lmoe.Blend(fresh, places, router="arrow", top_k=2)
    assert torch.equal(logits(model, tokens()), logits(fresh, tokens()))
    settings = {"attention_mask": torch.ones(2, 7), "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(tokens(), **settings)
    assert torch.equal(model.generate(tokens(), use_cache=False, **settings), cached)
    blend.remove("sql")
    assert_close(logits(model, tokens()), before, **CLOSE)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" ".join(TEXTS["code"]), " ".join(TEXTS["chat"])], 300, 64)


@pytest.fixture
def two(base, tmp_path):
    return {name: write_peft(base, tmp_path / name, seed=seed) for seed, name in enumerate(TEXTS)}


def test_the_encoder_gives_each_prompt_the_experts_whose_texts_it_is_like(model, two, tokenizer):
    blend = lmoe.Blend(model, two, router="encoder")
    with pytest.raises(BlendError, match=r"no centroid of code, chat: call blend.fit_centroids"):
        logits(model, tokens())
    blend.fit_centroids(TEXTS, tokenizer)
    for name, texts in TEXTS.items():
        for text in texts:
            logits(model, tokenizer(text, return_tensors="pt")["input_ids"])
            (row,) = blend.weights
            assert max(row, key=row.get) == name
            assert sum(row.values()) == pytest.approx(1)


def test_the_encoder_decides_once_a_prompt_and_rows_by_themselves(base, model, two, tokenizer):
    blend = lmoe.Blend(model, two, router="encoder", temperature=0.5)
    blend.fit_centroids(TEXTS, tokenizer)
    ids = tokens(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    rows = blend.weights
    assert len(rows) == 2 and rows[0] != rows[1]
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings), cached)
    assert blend.weights == rows

    cache = DynamicCache(config=model.config)
    first = logits(model, ids[:, :4], past_key_values=cache)
    decided = blend.weights
    second = logits(model, ids[:, 4:], past_key_values=cache)
    assert blend.weights == decided
    fixed = copy.deepcopy(base)
    lmoe.Blend(fixed, two, decided)
    assert_close(torch.cat([first, second], 1), logits(fixed, ids), **CLOSE)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], cached)
    assert blend.weights[0] == pytest.approx(rows[0], abs=1e-5)


def test_a_single_expert_under_the_encoder_has_weight_1_and_top_k_leaves_others_out(model, two, tokenizer):
    with lmoe.Blend(model, two, router="encoder", top_k=1) as blend:
        blend.fit_centroids(TEXTS, tokenizer)
        logits(model, tokens())
        assert all(sorted(row.values()) == [0.0, 1.0] for row in blend.weights)
        blend.remove("chat")
        logits(model, tokens())
        assert blend.weights == [{"code": 1.0}] * 2
        with pytest.raises(BlendError, match="router=encoder sets the weights from each prompt"):
            blend.weights = {"code": 1.0}


def test_centroids_are_kept_beside_the_experts_follow_names_and_are_read_again(base, model, two, tokenizer, tmp_path):
    blend = lmoe.Blend(model, two, router="encoder")
    blend.fit_centroids(TEXTS, tokenizer)
    assert blend.save_centroids() == [place / "centroid.safetensors" for place in two.values()]
    logits(model, tokens())
    rows = blend.weights
    blend.rename("chat", "talk")
    logits(model, tokens())
    assert blend.weights == [{"code": row["code"], "talk": row["chat"]} for row in rows]
    blend.close()
    again = lmoe.Blend(model, two, router="encoder")
    logits(model, tokens())
    assert again.weights == rows
    again.close()
    wrong = shutil.copytree(two["code"], tmp_path / "wrong")
    save_file({"centroid": torch.ones(7)}, wrong / "centroid.safetensors")
    with pytest.raises(BlendError, match=r"this base needs a centroid of 32"):
        lmoe.Blend(model, {"wrong": wrong}, router="encoder")
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"math": ["1"]}, "no expert 'math'"),
        ({"code": []}, "code: texts must be"),
        ({"code": "a"}, "code: texts must be"),
    ],
)
def test_texts_are_checked(model, two, tokenizer, texts, message):
    with pytest.raises(BlendError, match=message):
        lmoe.Blend(model, two, router="encoder").fit_centroids(texts, tokenizer)


def test_only_the_encoder_has_centroids(model, two, tokenizer):
    blend = lmoe.Blend(model, two)
    for call in (lambda: blend.fit_centroids(TEXTS, tokenizer), blend.save_centroids):
        with pytest.raises(BlendError, match="only router=encoder has centroids"):
            call()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_encoder_reads_the_prompt_and_no_padding_where_the_cache_is_static(family, tmp_path, tokenizer):
    base = tiny_model(family, vocab_size=300)
    two = dict(list(three(base, tmp_path).items())[:2])
    blend = lmoe.Blend(base, two, router="encoder", temperature=0.5)
    blend.fit_centroids(TEXTS, tokenizer)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens(2, 6)], 1)
    settings = {"attention_mask": (torch.arange(9) >= 3).long().expand(2, -1), "max_new_tokens": 4, "do_sample": False}
    expected = base.generate(ids, **settings)
    rows = blend.weights
    found = base.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(found, expected)
    assert [pytest.approx(row, abs=1e-5) for row in rows] == blend.weights


def test_before_the_first_prompt_the_encoder_has_no_weights_and_never_fixed_ones(model, two, tokenizer, tmp_path):
    blend = lmoe.Blend(model, two, router="encoder")
    assert blend.unfitted == ["code", "chat"]
    with pytest.raises(BlendError, match="from each prompt, and there was none yet"):
        _ = blend.weights
    for fixed in (blend.fold, lambda: blend.export(tmp_path / "out")):
        with pytest.raises(BlendError, match="a blend whose weights differ by prompt"):
            fixed()
    blend.fit_centroids(TEXTS, tokenizer)
    assert blend.unfitted == []
    with blend.silenced():
        logits(model, tokens())


def test_a_centroid_of_another_base_is_refused_before_anything_changes(model, two, tokenizer, base, tmp_path):
    other = tiny_model(vocab_size=300, seed=7)
    blend = lmoe.Blend(other, {"code": shutil.copytree(two["code"], tmp_path / "other")}, router="encoder")
    blend.fit_centroids({"code": TEXTS["code"]}, tokenizer)
    blend.save_centroids()
    mine = lmoe.Blend(model, {"chat": two["chat"]}, router="encoder")
    mine.fit_centroids({"chat": TEXTS["chat"]}, tokenizer)
    before = logits(model, tokens())
    with pytest.raises(BlendError, match="fitted on another base, fingerprint"):
        mine.add("code", tmp_path / "other")
    assert mine.names == ["chat"] and torch.equal(logits(model, tokens()), before)


def test_arrow_follows_a_model_that_moves_and_experts_that_are_renamed(base, model, places):
    blend = lmoe.Blend(model, places, router="arrow")
    model.to(torch.float64)
    blend.rename("code", "python")
    found = logits(model, tokens())
    fresh = copy.deepcopy(base).to(torch.float64)
    lmoe.Blend(fresh, {"python": places["code"], "chat": places["chat"], "sql": places["sql"]}, router="arrow")
    assert_close(found, logits(fresh, tokens()), atol=1e-5, rtol=1e-4)
