"""A blend with the router of the run that its experts are from computes what the run does."""

import copy
import json
import pickle
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lmoe
from lmoe.errors import BlendError, CheckpointError, LmoeError
from lmoe.injection.batch_info import conversations
from lmoe.peft.experts import save_peft_experts
from lmoe.peft.router_head import ABOUT, HEAD_FILE, read_head, write_head
from lmoe.vocabulary import TrainOn
from tests.tiny_models import randomise, tiny_model, tokens

BASE = {"max_position_embeddings": 128}
SETTINGS = {
    f"{decide}, {'on prompts too' if on else 'after prompts'}": {"decide": decide, "prompt_experts": on}
    for decide in ("first", "turn")
    for on in (False, True)
}
OTHERS = {
    "an early layer, one expert": ({"router_layer": 1, "scale": "unit"}, {"top_k": 1}),
    "embeddings, flat, bias": ({"router_layer": 0, "temperature": 3.0, "router_bias": True}, {"top_k": 3}),
    "weights as they are": ({"scale": "raw", "prompt_experts": True}, {}),
}
NEW = 5


def mixture(moe: dict, injection: dict | None = None):
    model = tiny_model(**BASE)
    own = {"lora_r": 4, "num_experts": 3, "top_k": 2, "attn_lora": {"enabled": False}} | (injection or {})
    lmoe.inject(model, own, {"router": "sequence", "router_scope": "model"} | moe)
    randomise(model, std=0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


def exported(model, folder):
    """The experts' folders by name, with the head beside them."""
    folders = save_peft_experts(model, folder, base_model="tiny")
    assert write_head(model, folder, list(folders)) == folder / HEAD_FILE
    return folders


def blended(folders, head, **options):
    model = tiny_model(**BASE)
    model.generation_config.eos_token_id = None
    backwards = dict(reversed(folders.items()))  # the head knows its experts by name
    return model, lmoe.Blend(model, backwards, router="encoder", head=head, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The mixture and the blend of each setting, made when first asked for."""
    made = {}

    def pair(name: str):
        if name not in made:
            moe, injection = OTHERS[name] if name in OTHERS else (SETTINGS[name], {})
            folder = tmp_path_factory.mktemp("head")
            model = mixture(moe, injection)
            made[name] = (model, *blended(exported(model, folder), folder))
        return made[name]

    return pair


@contextmanager
def heard(model):
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda _module, _args, output: logits.append(output.logits))
    try:
        yield logits
    finally:
        hook.remove()


def answer(model, ids, **options):
    """Tokens, and the logits of every forward."""
    with heard(model) as logits, torch.no_grad():
        mask = options.pop("attention_mask", torch.ones_like(ids))
        found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    return found, logits


def same(one, other, ids, **options):
    expected, found = answer(one, ids, **options), answer(other, ids, **options)
    assert torch.equal(expected[0], found[0])
    assert len(expected[1]) == len(found[1])
    for left, right in zip(expected[1], found[1], strict=True):
        torch.testing.assert_close(right, left, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*SETTINGS, *OTHERS])
def test_a_blend_with_the_head_has_the_logits_and_tokens_of_the_mixture(pairs, name):
    model, other, blend = pairs(name)
    ids = tokens(2, 9, seed=11)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    same(model, other, ids, attention_mask=mask)
    base = tiny_model(**BASE)
    assert not torch.allclose(answer(other, ids)[1][-1], answer(base, ids)[1][-1], atol=1e-2)
    decided = blend.weights
    assert isinstance(decided, list) and len(decided) == 2 and {len(row) for row in decided} == {3}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_way_of_generating_is_that_of_the_mixture(pairs, name):
    model, other, _ = pairs(name)
    ids = tokens(2, 9, seed=12)
    same(model, other, ids, use_cache=False)
    same(model, other, ids, num_beams=2, num_return_sequences=2)
    same(model, other, torch.cat([ids[:1], ids[:1]], 1), prompt_lookup_num_tokens=2)
    same(model, other, ids, cache_implementation="static", disable_compile=True)
    with pytest.raises(LmoeError, match="leave prefill_chunk_size out"):
        answer(other, ids, prefill_chunk_size=4)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_conversation_is_decided_as_the_mixture_decides_it(pairs, name):
    model, other, _ = pairs(name)
    ids = tokens(2, 14, seed=13)
    before = torch.zeros_like(ids, dtype=torch.bool)
    before[0, 4:7] = before[1, 3:5] = before[0, 9:11] = True
    found = []
    for one in (model, other):
        with conversations(one, before, torch.ones_like(before)):
            found.append(answer(one, ids))
    assert torch.equal(found[0][0], found[1][0])
    for left, right in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(right, left, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1][1][-1], answer(other, ids)[1][-1], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("first")])
def test_caches_keep_their_decisions_apart_and_copies_are_blends_of_their_own(pairs, name):
    _, other, blend = pairs(name)
    a, b, after = tokens(2, 7, seed=3), tokens(2, 5, seed=4), tokens(2, 1, seed=5)
    with torch.no_grad():
        expected = other(after, past_key_values=other(a, use_cache=True).past_key_values).logits
        first = other(a, use_cache=True).past_key_values
        copied = copy.deepcopy(first)
        other(b, use_cache=True)
        assert torch.equal(other(after, past_key_values=first).logits, expected)
        assert torch.equal(other(after, past_key_values=copied).logits, expected)
        with blend.silenced():
            assert torch.equal(other(a).logits, tiny_model(**BASE)(a).logits)
        for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert torch.equal(answer(twin, a)[0], answer(other, a)[0])


def test_closing_leaves_the_base_without_a_hook(tmp_path):
    folders = exported(mixture(SETTINGS["first, after prompts"]), tmp_path)
    model, blend = blended(folders, tmp_path)
    ids, base = tokens(2, 6), tiny_model(**BASE)
    answer(model, ids)
    blend.close()
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_with_a_head_is_refused_with_the_way_out(tmp_path):
    folders = exported(mixture(SETTINGS["first, after prompts"]), tmp_path)
    _, blend = blended(folders, tmp_path / HEAD_FILE)
    for change in (
        lambda: blend.add("more", folders["expert0"]),
        lambda: blend.remove("expert0"),
        lambda: blend.rename("expert0", "other"),
        lambda: blend.replace("expert0", folders["expert1"]),
    ):
        with pytest.raises(BlendError, match="make a new blend without it"):
            change()
    with pytest.raises(BlendError, match="with a head router=encoder has no centroids"):
        blend.save_centroids()
    with pytest.raises(BlendError, match="sets the weights from each prompt"):
        blend.weights = {}
    with pytest.raises(BlendError, match="weights differ by prompt"):
        blend.fold()
    refused = {
        "`head=.*` has no effect with `router=arrow`": {"router": "arrow"},
        "`top_k=1` has no effect with `head`": {"router": "encoder", "top_k": 1},
        "`temperature=2.0` has no effect with `head`": {"router": "encoder", "temperature": 2.0},
    }
    for words, options in refused.items():
        with pytest.raises(BlendError, match=words):
            lmoe.Blend(tiny_model(**BASE), folders, head=tmp_path, **options)
    base = tiny_model(**BASE)
    few = {"expert0": folders["expert0"]}
    with pytest.raises(BlendError, match="decides among expert0, expert1, expert2; the blend has expert0"):
        lmoe.Blend(base, few, router="encoder", head=tmp_path)
    assert torch.equal(base(tokens()).logits, tiny_model(**BASE)(tokens()).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_compiled_code_is_refused(pairs):
    _, other, _ = pairs("first, after prompts")
    try:
        with pytest.raises(BlendError, match="cannot be had inside torch.compile; call the model as it is"):
            torch.compile(other, backend="eager")(input_ids=tokens(1, 4), use_cache=False)
    finally:
        torch.compiler.reset()


def test_what_of_the_run_a_blend_does_otherwise_is_said_once(tmp_path):
    folders = exported(mixture(SETTINGS["first, on prompts too"], {"attn_lora": {"enabled": True}}), tmp_path)
    with pytest.warns(UserWarning, match="attention LoRA worked while the prompt was read"):
        blended(folders, tmp_path)


def test_a_router_for_each_site_has_no_head(tmp_path):
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 2, "num_experts": 2}, {"router": "sequence"})
    assert write_head(model, tmp_path, ["a", "b"]) is None and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format_version is 2; this lmoe reads 1"),
        ({"experts": ["a", "a", "b"]}, "experts names one twice"),
        ({"experts": "abc"}, "experts is 'abc', must be a list"),
        ({"experts": ["a", "b"]}, r"2 experts over this base need weight \(2, 32\)"),
        ({"top_k": 4}, "top_k is 4, must be from 1 to 3"),
        ({"router_layer": "x"}, "router_layer is 'x', must be a whole number"),
        ({"temperature": 0}, "temperature is 0, must be a number above 0"),
        ({"prompt_experts": 1}, "prompt_experts is 1, must be true or false"),
        ({"decide": "never"}, "decide is 'never'; allowed: first, turn"),
        ({"train_on": "none"}, "train_on is 'none'; allowed: assistant, last, all"),
        ({"otherwise": ["magic"]}, "must be a list of attn_lora, shared_lora, mixing_factors"),
        ({"base": {"fingerprint": "x"}}, "of a run on another base, fingerprint x"),
        ({"base": 3}, "base needs a fingerprint"),
    ],
)
def test_a_head_that_cannot_be_is_refused_by_its_field(tmp_path, change, words):
    model = mixture(SETTINGS["first, after prompts"])
    write_head(model, tmp_path, ["a", "b", "c"])
    base = lmoe.injection.record.injected(model).base
    about = json.loads(stored_about(tmp_path / HEAD_FILE))
    head = read_head(tmp_path, base, 32)
    assert head.experts == ("a", "b", "c") and torch.equal(head.tensors["weight"], model.router.weight)
    save_file(load_file(tmp_path / HEAD_FILE), tmp_path / HEAD_FILE, metadata={ABOUT: json.dumps(about | change)})
    with pytest.raises(CheckpointError, match=words):
        read_head(tmp_path, base, 32)


def test_a_head_says_which_turns_the_run_has_learnt_and_one_that_does_not_is_of_a_run_that_learnt_all_answers(tmp_path):
    model = mixture(SETTINGS["first, after prompts"])
    folders = save_peft_experts(model, tmp_path, base_model="tiny")
    write_head(model, tmp_path, list(folders), TrainOn.last)
    assert blended(folders, tmp_path)[1].train_on is TrainOn.last
    about = json.loads(stored_about(tmp_path / HEAD_FILE))
    assert about.pop("train_on") == "last" and about["format_version"] == 1
    save_file(load_file(tmp_path / HEAD_FILE), tmp_path / HEAD_FILE, metadata={ABOUT: json.dumps(about)})
    assert blended(folders, tmp_path)[1].train_on is TrainOn.assistant


def stored_about(path) -> str:
    from lmoe.adapter.tensor_file import stored_metadata

    return stored_metadata(path)[ABOUT]


def test_a_head_that_is_not_there_says_what_writes_it(tmp_path):
    model = mixture(SETTINGS["first, after prompts"])
    base = lmoe.injection.record.injected(model).base
    with pytest.raises(CheckpointError, match="`export_peft_experts` of a run with moe.router_scope=model"):
        read_head(tmp_path, base, 32)
    save_file({"weight": torch.zeros(2, 32)}, tmp_path / HEAD_FILE)
    with pytest.raises(CheckpointError, match="it is no head of lmoe"):
        read_head(tmp_path, base, 32)
