"""int8 and nf4 bases: quantise first, inject second; the adapters stay float32 and learn through the frozen layers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lmoe
from lmoe.adapter.folder import adapter_tensors, load_adapter, read_adapter_config, save_adapter
from lmoe.backbones.load import load_model, precision_of
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError, InjectionError
from lmoe.injection.roles import role_table
from lmoe.injection.tracing import adapters_off
from lmoe.run.parts import base_ffn_parameters
from lmoe.vocabulary import BackbonePrecision
from tests.tiny_models import randomise, tiny_model, tokens

QUANTISED = (BackbonePrecision.int8, BackbonePrecision.nf4)
STRATEGIES = ("dense_lora", "mixture_lora", "moe_expert_lora")
# bitsandbytes computes int8 in float16, and says so once a layer.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:_check_is_size will be removed:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved backbone with widths that 4-bit blocks of 64 can hold."""
    path = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(path)
    return path


def loaded(folder: Path, precision: BackbonePrecision) -> nn.Module:
    return load_model(BackboneConfig(model_name=str(folder), precision=precision))


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_linears_are_quantised_and_the_function_stays_near(folder, precision):
    model, ids = loaded(folder, precision), tokens()
    plain = loaded(folder, BackbonePrecision.float32)
    assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    assert precision_of(model) is precision and precision_of(plain) is BackbonePrecision.float32
    with torch.no_grad():
        far = (model(ids).logits.float() - plain(ids).logits).std() / plain(ids).logits.std()
    assert 0 < far < 0.5


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_parameters_are_counted_as_those_of_the_plain_base(folder, precision):
    """Two of them share a byte in nf4."""
    counts = []
    for stored in (precision, BackbonePrecision.float32):
        model = loaded(folder, stored)
        assert base_ffn_parameters(model, lmoe.plan(model, {"lora_r": 4})) == 2 * 3 * 64 * 128
        lmoe.inject(model, {"lora_r": 4})
        counts.append(role_table(model))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_go_through_the_frozen_layers_also_after_a_forward_in_evaluation_mode(folder, precision, strategy):
    """The reference is the same base with its quantised weights read back into plain Linears."""
    model, ids = loaded(folder, precision), tokens()
    with torch.no_grad():
        model(ids)  # which may repack 4-bit weights for inference
        twin = read_back(model, folder)
    found = []
    for base in (model, twin):
        torch.manual_seed(3)
        lmoe.inject(base, {"strategy": strategy, "lora_r": 4})
        randomise(base, std=0.1)
        base.eval()(ids)
        base.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in base.named_parameters() if p.grad is not None})
        assert {p.dtype for p in base.parameters() if p.requires_grad} == {torch.float32}
    assert found[0].keys() == found[1].keys()
    first = [name for name in found[0] if name.startswith("model.layers.0.") and "lora_B" in name]
    assert first
    for name in first:
        near = torch.cosine_similarity(found[0][name].flatten(), found[1][name].flatten(), dim=0)
        assert near > 0.97, name


def read_back(model: nn.Module, folder: Path) -> nn.Module:
    """The plain model with the numbers that the quantised one computes with, in bfloat16."""
    plain = loaded(folder, BackbonePrecision.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            columns = module(torch.eye(module.in_features, dtype=torch.bfloat16))
            plain.get_submodule(name).weight.data.copy_(columns.t())
    return plain


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_and_loaded_adapters_give_the_same_logits_bitwise(folder, precision, strategy, tmp_path):
    model, ids = loaded(folder, precision), tokens()
    with torch.no_grad():
        base = model(ids).logits
        lmoe.inject(model, {"strategy": strategy, "lora_r": 4})
        randomise(model, std=0.1)
        with adapters_off(model):
            assert torch.equal(model(ids).logits, base)
        save_adapter(model, tmp_path, {"name": str(folder), "revision": None, "precision": precision_of(model).value})
        config = read_adapter_config(tmp_path)
        fresh = loaded(folder, BackbonePrecision(config.base_model["precision"]))
        lmoe.inject(fresh, config.injection, config.moe)
        load_adapter(fresh, tmp_path, config)
        assert torch.equal(fresh(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"attn_lora": {"use_dora": True}}, "injection.attn_lora.use_dora needs the numbers of the weight"),
        ({"init_lora": "svd"}, "init_lora=svd needs the numbers of the weight"),
        ({"strategy": "moe_expert_lora", "share_base": False}, r"share_base=false \(gate_proj\) needs the numbers"),
    ],
)
def test_what_needs_the_numbers_of_a_quantised_weight_is_refused(folder, given, what):
    model = loaded(folder, BackbonePrecision.nf4)
    before = dict(model.named_modules())
    with pytest.raises(InjectionError, match=what):
        lmoe.inject(model, given)
    assert dict(model.named_modules()) == before


def test_without_bitsandbytes_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("lmoe.backbones.load.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"precision=nf4 needs bitsandbytes.*pip install 'lmoe\[quantised\]'"):
        loaded(folder, BackbonePrecision.nf4)


@pytest.mark.parametrize("precision", QUANTISED)
def test_save_pretrained_writes_the_adapter_alone_which_loads_attaches_and_fills_by_load_state_dict(
    folder, precision, tmp_path
):
    model, other, attached = (loaded(folder, precision) for _ in range(3))
    lmoe.inject(model, {"lora_r": 4})
    randomise(model)
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()  # from_pretrained would make up what is not there
    lmoe.inject(other, {"lora_r": 4})
    other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    lmoe.attach(attached, tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(other(tokens()).logits, expected) and torch.equal(attached(tokens()).logits, expected)


@pytest.mark.parametrize("precision", QUANTISED)
def test_an_adapter_of_the_plain_base_attaches_to_a_quantised_one(folder, precision, tmp_path):
    plain, model = loaded(folder, BackbonePrecision.float32), loaded(folder, precision)
    lmoe.inject(plain, {"lora_r": 4})
    randomise(plain, std=0.1)
    lmoe.attach(model, lmoe.save(plain, tmp_path / "adapter"))
    own = adapter_tensors(plain)
    assert all(torch.equal(tensor, own[name]) for name, tensor in adapter_tensors(model).items())
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()
