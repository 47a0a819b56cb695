"""A fixed blend folded into the weights and back, and written as one adapter or one model."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.blend.linear import BlendLinear
from lmoe.errors import BlendError
from lmoe.ops.merge import merged_weight
from lmoe.peft.expert_file import Branch
from lmoe.peft.reader import read_expert
from lmoe.peft.writer import write_expert
from tests.peft_experts import logits, three, write_peft
from tests.tiny_models import tiny_model, tokens

CLOSE = {"atol": 3e-5, "rtol": 1e-4}
FAMILIES = ("qwen3", "llama", "gpt2", "phi3")
WEIGHTS = {"code": 0.7, "chat": -0.4, "sql": 1.3}


@pytest.fixture(params=FAMILIES)
def case(request, tmp_path):
    """(base, model that blends, its blend)."""
    base = tiny_model(request.param)
    model = copy.deepcopy(base)
    return base, model, lmoe.Blend(model, three(base, tmp_path / "experts"), WEIGHTS)


def same(model: nn.Module, base: nn.Module) -> bool:
    mine = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    return all(torch.equal(parameter, mine[name]) for name, parameter in base.named_parameters())


def test_folding_keeps_the_function_and_unfolding_restores_every_bit(case):
    base, model, blend = case
    before = logits(model, tokens())
    cost = blend.fold()
    assert blend.is_folded and not any(isinstance(module, BlendLinear) for module in model.modules())
    assert cost.sites == len(blend.sites) and cost.bytes_changed == cost.bytes_kept > 0 and cost.seconds > 0
    assert_close(logits(model, tokens()), before, **CLOSE)
    for change in (lambda: setattr(blend, "weights", {}), lambda: blend.remove("code"), blend.fold):
        with pytest.raises(BlendError, match=r"folded into the weights; call unfold\(\) first"):
            change()
    blend.unfold()
    assert same(model, base) and torch.equal(logits(model, tokens()), before)
    with pytest.raises(BlendError, match="the blend is not folded"):
        blend.unfold()
    blend.fold()
    blend.close()
    assert same(model, base) and torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_the_originals_can_be_read_again_from_the_bases_files(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    blend = lmoe.Blend(model, three(base, tmp_path / "experts"), WEIGHTS)
    before = logits(model, tokens())
    assert blend.fold(keep="reread").bytes_kept == 0
    assert_close(logits(model, tokens()), before, **CLOSE)
    blend.unfold()
    assert same(model, base) and torch.equal(logits(model, tokens()), before)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1
    with pytest.raises(
        BlendError, match=r"does not hold model.layers.1.mlp.up_proj.weight as the model has it; use keep"
    ):
        blend.fold(keep="reread")
    assert not blend.is_folded and len([m for m in model.modules() if isinstance(m, BlendLinear)]) == 14


def test_folding_refuses_what_it_cannot_undo_or_what_is_not_fixed(tmp_path):
    base = tiny_model(tie_word_embeddings=True)
    head = {"lm_head": Branch(torch.randn(2, 32), torch.randn(64, 2), 1.0)}
    place = write_expert(head, tmp_path / "head", base_model="", fan_in_fan_out=False)
    blend = lmoe.Blend(copy.deepcopy(base), {"head": place})
    with pytest.raises(BlendError, match=r"lm_head shares its weight with model.embed_tokens.weight"):
        blend.fold()
    with pytest.raises(BlendError, match="keep='disk'; allowed: copy, reread"):
        blend.fold(keep="disk")
    with pytest.raises(BlendError, match="no local directory; use keep=copy"):
        lmoe.Blend(tiny_model(), {"plain": write_peft(tiny_model(), tmp_path / "plain")}).fold(keep="reread")
    blend.weights = [{"head": 1.0}, {}]
    for fixed in (blend.fold, lambda: blend.export(tmp_path / "out")):
        with pytest.raises(BlendError, match="whose weights differ by row"):
            fixed()


def test_the_export_by_ranks_is_exact_in_peft(case, tmp_path):
    base, model, blend = case
    report = blend.export(tmp_path / "out")
    assert set(report.errors.values()) == {0.0} and max(report.ranks.values()) == 4 + 8 + 2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    assert_close(logits(theirs, tokens()), logits(model, tokens()), **CLOSE)
    with pytest.raises(BlendError, match="exists and is not an empty directory"):
        blend.export(tmp_path / "out")


def test_the_export_by_svd_says_its_error_and_is_exact_at_the_whole_rank(case, tmp_path):
    base, model, blend = case
    near = blend.export(tmp_path / "near", method="svd", rank=3)
    whole = blend.export(tmp_path / "whole", method="svd", rank=14)
    assert set(near.ranks.values()) <= {2, 3} and max(whole.errors.values()) < 1e-6
    assert all(0 <= error < 1 for error in near.errors.values()) and max(near.errors.values()) > 0.1
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "whole").eval()
    assert_close(logits(theirs, tokens()), logits(model, tokens()), **CLOSE)
    path = max(near.errors, key=near.errors.get)
    written, exact = (read_expert(tmp_path / name).branches[path] for name in ("near", "whole"))
    products = [branch.scaling * branch.lora_B @ branch.lora_A for branch in (written, exact)]
    assert ((products[0] - products[1]).norm() / products[1].norm()).item() == pytest.approx(
        near.errors[path], rel=1e-3
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"r": 3, "lora_alpha": 7}, {"alpha_pattern": {".*1.*": 5}}]
)
def test_import_export_import_is_the_identity(family, changes, tmp_path):
    base = tiny_model(family)
    place = write_peft(base, tmp_path / "first", **changes)
    lmoe.Blend(copy.deepcopy(base), {"own": place}, {"own": 1.0}).export(tmp_path / "second")
    first, second = read_expert(place).branches, read_expert(tmp_path / "second").branches
    assert first.keys() == second.keys() and len(first) >= 8
    for path, branch in first.items():
        assert torch.equal(branch.lora_A, second[path].lora_A) and torch.equal(branch.lora_B, second[path].lora_B)
        assert math.isclose(branch.scaling, second[path].scaling, rel_tol=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties"}, "method='ties'; allowed: cat"),
        ({"rank": 4}, "rank=4 has no effect with method=cat"),
        ({"method": "svd"}, "method=svd needs a rank from 1 on, got None"),
        ({"method": "svd", "rank": 0}, "method=svd needs a rank from 1 on, got 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, settings, message):
    base = tiny_model()
    blend = lmoe.Blend(copy.deepcopy(base), {"own": write_peft(base, tmp_path / "own")})
    with pytest.raises(BlendError, match=message):
        blend.export(tmp_path / "out", **settings)
    blend.weights = {}
    with pytest.raises(BlendError, match="every weight is 0"):
        blend.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_loads_by_itself_and_the_blend_goes_on(case, tmp_path):
    base, model, blend = case
    before = logits(model, tokens())
    blend.save_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged, tokens()), before, **CLOSE)
    assert not blend.is_folded and torch.equal(logits(model, tokens()), before)
    assert same(model, base)


def test_folding_that_breaks_off_restores_every_bit(case, monkeypatch):
    base, model, blend = case
    before, made = logits(model, tokens()), []

    def breaks(*given):
        made.append(given)
        if len(made) == 4:
            raise MemoryError
        return merged_weight(*given)

    monkeypatch.setattr("lmoe.blend.fold.merged_weight", breaks)
    with pytest.raises(MemoryError):
        blend.fold()
    monkeypatch.undo()
    assert not blend.is_folded and same(model, base) and torch.equal(logits(model, tokens()), before)


def test_a_base_that_was_written_anew_meanwhile_is_not_taken_for_the_original(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    blend = lmoe.Blend(model, three(base, tmp_path / "experts"), WEIGHTS)
    before = logits(model, tokens())
    blend.fold(keep="reread")
    tiny_model(seed=3).save_pretrained(tmp_path / "base")
    folded = logits(model, tokens())
    with pytest.raises(BlendError, match=r"is another one than when the blend was folded; put it back"):
        blend.unfold()
    assert blend.is_folded and torch.equal(logits(model, tokens()), folded)
    base.save_pretrained(tmp_path / "base")
    blend.unfold()
    assert torch.equal(logits(model, tokens()), before)
