"""A blend computes what PEFT computes, its weights may change, and it leaves the base as it was."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import StaticCache

import lmoe
from lmoe.blend.linear import BlendLinear
from lmoe.blend.sites import SiteGroup
from lmoe.errors import BlendError, CheckpointError, InjectionError
from tests.peft_experts import LINEARS, logits, peft_blend, three, write_peft
from tests.tiny_models import tiny_model, tokens

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
FAMILIES = ("qwen3", "llama", "gpt2", "phi3")
WEIGHTS = {"code": 0.7, "chat": -0.4, "sql": 1.3}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weighted_blend_equals_peft_cat_also_with_negative_weights_ranks_scalings_and_targets_that_differ(
    family, tmp_path
):
    base, ids = tiny_model(family), tokens()
    places = three(base, tmp_path)
    expected = logits(peft_blend(base, places, WEIGHTS), ids)
    model = copy.deepcopy(base)
    lmoe.Blend(model, places, WEIGHTS)
    assert_close(logits(model, ids), expected, **CLOSE)
    assert (expected - logits(base, ids)).abs().max() > 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"o_proj|attn.c_proj": 7},
            "alpha_pattern": {"^.*(up_proj|c_fc)": 3, "down_proj|mlp.c_proj": 0.5},
        },
        {"lora_alpha": 16, "r": 3},
    ],
    ids=["plain", "rslora", "patterns", "ratio"],
)
def test_one_imported_expert_equals_peft(family, changes, tmp_path):
    base, ids = tiny_model(family), tokens()
    place = write_peft(base, tmp_path / "expert", **changes)
    model = copy.deepcopy(base)
    lmoe.Blend(model, {"only": place})
    assert_close(logits(model, ids), logits(PeftModel.from_pretrained(copy.deepcopy(base), place).eval(), ids), **CLOSE)


def test_an_adapter_that_starts_at_minor_components_equals_peft(base, model, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEARS["qwen3"], init_lora_weights="mica")
    peft = get_peft_model(copy.deepcopy(base), config)
    assert_close(logits(peft, tokens()), logits(base, tokens()))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    peft.save_pretrained(tmp_path / "mica")
    lmoe.Blend(model, {"only": tmp_path / "mica"})
    assert_close(logits(model, tokens()), logits(peft.eval(), tokens()), **CLOSE)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_the_output_layer_brings_the_bases_weight_and_equals_peft(tied, dtype, tmp_path):
    base = tiny_model(tie_word_embeddings=tied)
    place = write_peft(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(place / "adapter_model.safetensors")
    model = copy.deepcopy(base).to(dtype)
    lmoe.Blend(model, {"only": place})
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), place).eval(), tokens())
    tolerance = CLOSE if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}
    assert_close(logits(model, tokens()).float(), expected, **tolerance)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight", "lm_head.base_layer.weight"])
@pytest.mark.parametrize("resized", [False, True])
def test_a_weight_of_the_base_is_read_over_where_it_is_equal_and_named_where_it_is_not(
    key, resized, base, model, tmp_path
):
    place = write_peft(base, tmp_path / "expert")
    tensors, before = load_file(place / "adapter_model.safetensors"), logits(base, tokens())
    weight = base.get_submodule(key.removesuffix(".weight").removesuffix(".base_layer")).weight.detach()
    stored = f"base_model.model.{key}"
    save_file(tensors | {stored: weight.clone()}, place / "adapter_model.safetensors")
    with lmoe.Blend(model, {"only": place}):
        assert not torch.equal(logits(model, tokens()), before)
    other = torch.cat([weight, weight[:1]]) if resized else weight * 1.5
    save_file(tensors | {stored: other}, place / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"is not the weight of .* save_embedding_layers=False"):
        lmoe.Blend(model, {"only": place})
    assert torch.equal(logits(model, tokens()), before)


def test_an_lmoe_adapter_and_its_run_are_experts_too(base, model, tmp_path):
    trained = copy.deepcopy(base)
    settings = {"strategy": "dense_lora", "lora_r": 3, "attn_lora": {"lora_r": 5, "lora_alpha": 7}}
    lmoe.inject(trained, injection=settings)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lmoe.save(trained, tmp_path / "run/adapter")
    for place in (tmp_path / "run", tmp_path / "run/adapter"):
        with lmoe.Blend(model, {"own": place}):
            assert_close(logits(model, tokens()), logits(trained, tokens()), **CLOSE)


def test_setting_weights_replaces_all_and_zero_weights_are_exactly_the_base(base, model, places):
    blend = lmoe.Blend(model, places, WEIGHTS)
    blend.weights = {"chat": 1.0}
    assert blend.weights == {"code": 0.0, "chat": 1.0, "sql": 0.0}
    alone = copy.deepcopy(base)
    lmoe.Blend(alone, {"chat": places["chat"]}, {"chat": 1.0})
    assert_close(logits(model, tokens()), logits(alone, tokens()), **CLOSE)
    blend.weights = {"code": 0.0009, "sql": -0.0009}
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_without_weights_all_experts_count_equally(model, places):
    assert lmoe.Blend(model, places).weights == dict.fromkeys(places, 1 / 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_by_row_equal_separate_runs(family, tmp_path):
    base, ids = tiny_model(family), tokens(3)
    model, rows = copy.deepcopy(base), [{"code": 1.0}, {"chat": 0.5, "sql": -1.0}, {}]
    blend = lmoe.Blend(model, three(base, tmp_path))
    apart = []
    for row, own in zip(rows, ids, strict=True):
        blend.weights = row
        apart.append(logits(model, own[None]))
    blend.weights = rows
    assert blend.weights[1] == {"code": 0.0, "chat": 0.5, "sql": -1.0}
    assert_close(logits(model, ids), torch.cat(apart), **CLOSE)
    with pytest.raises(BlendError, match="the batch has 2 rows, and blend.weights were set for 3"):
        logits(model, ids[:2])
    blend.weights = {"code": 1.0}
    assert_close(logits(model, ids[:1]), apart[0], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_for_each_row_equals_pefts_mixed_batches(family, tmp_path):
    base, ids = tiny_model(family), tokens(4)
    places, model = three(base, tmp_path), copy.deepcopy(base)
    lmoe.Blend(model, places).weights = [{"sql": 1.0}, {"code": 1.0}, {}, {"chat": 1.0}]
    peft = PeftModel.from_pretrained(copy.deepcopy(base), places["code"], adapter_name="code")
    for name in ("chat", "sql"):
        peft.load_adapter(places[name], name)
    names = ["sql", "code", "__base__", "chat"]
    assert_close(logits(model, ids), logits(peft.eval(), ids, adapter_names=names), **CLOSE)


def generated(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **settings)


def test_cached_generation_equals_uncached_batched_left_padded_and_with_a_static_cache(model, places):
    lmoe.Blend(model, places, WEIGHTS)
    ids = tokens(2, 6)
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, cache_implementation="static", disable_compile=True), expected)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    assert torch.equal(generated(model, padded, mask)[:, 3:], expected)


def test_step_by_step_with_a_static_cache_equals_one_forward(model, places):
    lmoe.Blend(model, places, WEIGHTS)
    ids = tokens(1, 6)
    cache = StaticCache(config=model.config, max_cache_len=8)
    steps = [logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(6)]
    assert_close(torch.cat(steps, 1), logits(model, ids), **CLOSE)


def test_adding_removing_renaming_and_replacing_leaves_the_others_bitwise(base, model, places, tmp_path):
    ids, two = tokens(), {name: places[name] for name in ("code", "chat")}
    blend = lmoe.Blend(model, two, {"code": 0.7, "chat": -0.3})
    before = logits(model, ids)
    tensors = {name: parameter.clone() for name, parameter in model.named_parameters()}
    blend.add("sql", places["sql"])
    assert blend.names == ["code", "chat", "sql"] and blend.weights["sql"] == 0.0
    assert torch.equal(logits(model, ids), before)
    blend.weights = {"code": 0.7, "chat": -0.3, "sql": 2.0}
    assert not torch.equal(logits(model, ids), before)
    blend.replace("sql", write_peft(base, tmp_path / "other", seed=9))
    blend.weights = {"code": 0.7, "chat": -0.3}
    assert torch.equal(logits(model, ids), before)
    blend.rename("code", "python")
    assert blend.weights == {"python": 0.7, "chat": -0.3, "sql": 0.0}
    assert torch.equal(logits(model, ids), before)
    blend.remove("sql")
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())


def test_replacing_equals_a_blend_that_was_made_so(base, model, places, tmp_path):
    blend = lmoe.Blend(model, places, WEIGHTS)
    other = write_peft(base, tmp_path / "other", seed=9, r=6, target_modules=LINEARS["qwen3"][:1])
    blend.replace("chat", other)
    fresh = copy.deepcopy(base)
    lmoe.Blend(fresh, places | {"chat": other}, WEIGHTS)
    assert torch.equal(logits(model, tokens()), logits(fresh, tokens()))


def test_removing_the_last_expert_leaves_the_base_and_another_may_come(base, model, places):
    blend = lmoe.Blend(model, {"code": places["code"]})
    blend.remove("code")
    assert blend.sites == [] and torch.equal(logits(model, tokens()), logits(base, tokens()))
    blend.add("chat", places["chat"])
    blend.weights = {"chat": 1.0}
    assert not torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_closing_gives_the_base_back(base, model, places):
    with lmoe.Blend(model, places) as blend:
        assert len(blend.sites) == 14 and all(isinstance(model.get_submodule(s), BlendLinear) for s in blend.sites)
    blend.close()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    lmoe.Blend(model, places)
    with pytest.raises(BlendError, match="this blend is closed"):
        blend.weights = {}


def test_a_refused_expert_leaves_the_model_as_it_was(base, model, places, tmp_path):
    wrong = write_peft(tiny_model(hidden_size=16), tmp_path / "wrong")
    with pytest.raises(CheckpointError, match="down_proj was trained for 48 in, 16 out; here it has 48 in, 32"):
        lmoe.Blend(model, {**places, "wrong": wrong})
    blend = lmoe.Blend(model, places, WEIGHTS)
    before = logits(model, tokens())
    for change in (lambda: blend.add("wrong", wrong), lambda: blend.replace("code", wrong)):
        with pytest.raises(CheckpointError):
            change()
    assert blend.names == list(places) and torch.equal(logits(model, tokens()), before)


def test_a_model_is_taken_once(model, places, base):
    lmoe.Blend(model, places)
    with pytest.raises(BlendError, match=r"this model blends already.*close\(\) it first"):
        lmoe.Blend(model, places)
    with pytest.raises(InjectionError, match=r"this model blends experts; close\(\) its blend to inject"):
        lmoe.inject(model)
    injected = copy.deepcopy(base)
    lmoe.inject(injected)
    with pytest.raises(BlendError, match="this model carries injected experts; load the backbone anew"):
        lmoe.Blend(injected, places)
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), places["code"])
    with pytest.raises(BlendError, match="this model carries PEFT adapters"):
        lmoe.Blend(adapted, places)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cod": 1}, "no expert 'cod'; there are code, chat, sql"),
        ({"code": float("nan")}, "code=nan is no finite number"),
        ({"code": True}, "code=True is no finite number"),
        ([{"code": 1}, {"sqll": 1}], "row 1: no expert 'sqll'"),
        ([], "weights are a dict by name, or a list of such dicts"),
        ("code", "weights are a dict by name"),
        (0.5, "weights are a dict by name"),
    ],
)
def test_weights_that_cannot_be_are_refused_and_the_old_ones_stay(model, places, weights, message):
    blend = lmoe.Blend(model, places, WEIGHTS)
    with pytest.raises(BlendError, match=message):
        blend.weights = weights
    assert blend.weights == WEIGHTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "xlora"}, "`router=xlora`: allowed: weighted, static, arrow, encoder"),
        ({"top_k": 2}, "`top_k=2` has no effect with `router=weighted`"),
        ({"router": "arrow", "temperature": 0}, "`temperature=0` must be a number above 0"),
        ({"router": "arrow", "top_k": 0}, "`top_k=0` must be a whole number from 1 on"),
        ({"router": "arrow", "weights": {}}, "`weights` have no effect with `router=arrow`"),
        ({"experts": {}}, "with at least one"),
        ({"experts": {"": "x"}}, "an expert's name must be text"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, places, settings, message):
    with pytest.raises(BlendError, match=message):
        lmoe.Blend(**({"model": model, "experts": places} | settings))


def test_names_are_checked(model, places):
    blend = lmoe.Blend(model, places)
    with pytest.raises(BlendError, match="there is an expert 'chat' already"):
        blend.add("chat", places["chat"])
    with pytest.raises(BlendError, match="there is an expert 'chat' already"):
        blend.rename("code", "chat")
    with pytest.raises(BlendError, match="no expert 'math'; there are code, chat, sql"):
        blend.remove("math")


def test_static_weights_stay(model, places):
    blend = lmoe.Blend(model, places, WEIGHTS, router="static")
    assert blend.weights == WEIGHTS
    with pytest.raises(BlendError, match="use router=weighted to change them"):
        blend.weights = {"code": 1.0}


def test_with_autograd_the_numbers_are_the_same_and_the_base_gets_gradients(model, places):
    lmoe.Blend(model, places, WEIGHTS)
    expected = logits(model, tokens())
    found = model(input_ids=tokens()).logits
    found.square().mean().backward()
    assert_close(found, expected, **CLOSE)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_bfloat16_base_has_bfloat16_experts_unless_asked(model, places, base):
    model, expected = model.bfloat16(), logits(peft_blend(base, places, WEIGHTS), tokens())
    for dtype in (None, torch.float32):
        with lmoe.Blend(model, places, WEIGHTS, dtype=dtype) as blend:
            stored = {buffer.dtype for name, buffer in model.named_buffers() if "lora_" in name}
            assert stored == {dtype or torch.bfloat16}
            assert blend.sites and logits(model, tokens()).dtype == torch.bfloat16
            assert (logits(model, tokens()).float() - expected).norm() < 0.1 * expected.norm()


def test_moving_the_model_moves_the_blend(model, places):
    lmoe.Blend(model, places, WEIGHTS)
    expected = logits(model, tokens())
    model.double()
    assert_close(logits(model, tokens()).float(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("gone", ["code", "chat", "sql"])
def test_an_active_expert_taken_off_leaves_what_a_blend_without_it_computes(base, model, places, gone):
    blend = lmoe.Blend(model, places, WEIGHTS)
    blend.remove(gone)
    fresh = copy.deepcopy(base)
    rest = {name: place for name, place in places.items() if name != gone}
    lmoe.Blend(fresh, rest, {name: WEIGHTS[name] for name in rest})
    assert torch.equal(logits(model, tokens()), logits(fresh, tokens()))


@pytest.mark.parametrize("by_row", [False, True], ids=["model", "row"])
@pytest.mark.parametrize("weak", ["code", "chat", "sql"])
def test_a_weight_below_the_threshold_is_zero_wherever_it_stands(model, places, weak, by_row):
    def computed(value: float):
        weights = dict.fromkeys(places, 1.0) | {weak: value}
        blend.weights = [weights, dict.fromkeys(places, 1.0)] if by_row else weights
        return logits(model, tokens())

    blend = lmoe.Blend(model, places)
    assert torch.equal(computed(0.0009), computed(0.0))
    assert not torch.equal(computed(0.002), computed(0.0))


@pytest.mark.parametrize("change", ["add", "replace", "remove"])
def test_a_change_that_breaks_off_in_the_middle_changes_nothing(model, places, change, monkeypatch):
    two = {name: places[name] for name in ("code", "chat")}
    blend = lmoe.Blend(model, two, {"code": 0.7, "chat": -0.3})
    before, used = logits(model, tokens()), []

    def breaks(group, built):
        used.append(group)
        if len(used) == 3:
            raise KeyboardInterrupt
        use(group, built)

    use = SiteGroup.use
    monkeypatch.setattr(SiteGroup, "use", breaks)
    with pytest.raises(KeyboardInterrupt):
        {
            "add": lambda: blend.add("sql", places["sql"]),
            "replace": lambda: blend.replace("chat", places["sql"]),
            "remove": lambda: blend.remove("chat"),
        }[change]()
    monkeypatch.undo()
    assert blend.names == ["code", "chat"] and torch.equal(logits(model, tokens()), before)
    blend.weights = {"code": 0.1}
    blend.weights = {"code": 0.7, "chat": -0.3}
    assert torch.equal(logits(model, tokens()), before)


def test_a_blend_that_cannot_be_made_leaves_the_base(base, model, places, monkeypatch):
    monkeypatch.setattr(SiteGroup, "build", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        lmoe.Blend(model, places)
    monkeypatch.undo()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    lmoe.Blend(model, places)


def test_an_expert_that_comes_while_the_base_is_alone_waits_too(base, model, places):
    blend = lmoe.Blend(model, {"code": places["code"]}, {"code": 1.0})
    with blend.silenced():
        blend.add("chat", places["chat"])
        assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    assert not torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_the_base_alone_for_a_while(base, model, places):
    blend = lmoe.Blend(model, places, WEIGHTS)
    before = logits(model, tokens())
    with blend.silenced():
        with blend.silenced():
            pass
        assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    assert torch.equal(logits(model, tokens()), before)
    blend.fold()
    with pytest.raises(BlendError, match=r"folded into the weights; call unfold\(\) first"), blend.silenced():
        pass
