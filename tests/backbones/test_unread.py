"""A base whose weights stay in their files is the one that Transformers loads, but for where its numbers are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.modeling_utils import SAFE_WEIGHTS_NAME

import lmoe
from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.load import load_model
from lmoe.backbones.placement import refuse_offloaded
from lmoe.backbones.unread import unread_model
from lmoe.backbones.weight_files import unread, weights_at
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.vocabulary import BackbonePrecision
from tests.tiny_models import DENSE_FAMILIES, NATIVE_FAMILIES, tiny_model, tokens

FLOATS = (BackbonePrecision.float32, BackbonePrecision.bfloat16)
CONVERTED = tuple(family for family in NATIVE_FAMILIES if family not in ("gpt_oss", "gemma4_moe"))
RENAMED = ("gemma3",)
"""Its text model alone is loaded of what has another one for pictures: its files have other names."""


def of(folder: Path, precision: BackbonePrecision = BackbonePrecision.float32) -> BackboneConfig:
    return BackboneConfig(model_name=str(folder), precision=precision)


def read_later(config: BackboneConfig) -> PreTrainedModel:
    model = unread_model(config)
    assert not isinstance(model, str), model
    return model


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("family", [*DENSE_FAMILIES, *NATIVE_FAMILIES])
def test_of_every_family_the_weights_are_those_that_transformers_loads_or_a_reason_is_given(
    family, precision, tmp_path
):
    saved = tiny_model(family)
    (saved.bfloat16() if family == "qwen3" else saved).save_pretrained(tmp_path)
    model = unread_model(of(tmp_path, precision))
    if family in (*CONVERTED, *RENAMED):
        assert isinstance(model, str) and ("converts its weights" in model or "other names of weights" in model)
        return
    assert not isinstance(model, str), model
    loaded, files = load_model(of(tmp_path, precision)), unread(model)
    own = dict(loaded.named_parameters())
    assert files is not None and own.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta and not parameter.requires_grad and parameter.dtype == own[name].dtype
        assert torch.equal(files.whole(name, parameter.dtype), own[name])
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
    assert base_fingerprint(model) == base_fingerprint(loaded)
    assert model.config.to_dict() == loaded.config.to_dict() and model.name_or_path == loaded.name_or_path
    assert model.generation_config.to_dict() == loaded.generation_config.to_dict()  # type: ignore[union-attr]
    assert [(type(m), m.training) for m in model.modules()] == [(type(m), m.training) for m in loaded.modules()]
    with weights_at(model, ""), torch.no_grad():
        assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_checkpoint_of_several_files_is_read_like_one(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    files = unread(read_later(of(tmp_path)))
    assert files is not None and files.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(files.whole(name, torch.float32), parameter)


def test_rows_are_read_into_a_tensor_of_another_type(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    files, rows = unread(read_later(of(tmp_path))), torch.empty(5, 32, dtype=torch.bfloat16)
    assert files is not None
    files.read_rows("model.embed_tokens.weight", rows, 7)
    assert torch.equal(rows, model.model.embed_tokens.weight[7:12].bfloat16())


SETTINGS = {
    "mixture": {"strategy": "mixture_lora", "lora_B_std": 0.1},
    "svd": {"strategy": "mixture_lora", "init_lora": "svd", "num_experts": 2},
    "dora": {"strategy": "dense_lora", "attn_lora": {"use_dora": True}},
    "experts": {"strategy": "moe_expert_lora"},
    "copies": {"strategy": "moe_expert_lora", "share_base": False},
}


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_start_bit_by_bit_as_in_a_base_that_is_loaded(name, precision, tmp_path):
    """Routers, a reward head and what begins with numbers of the base too."""
    tiny_model().save_pretrained(tmp_path)
    models = load_model(of(tmp_path, precision)), read_later(of(tmp_path, precision))
    for model in models:
        torch.manual_seed(7)
        lmoe.inject(model, {"lora_r": 4, **SETTINGS[name]}, reward_head=True)
    loaded, later = ({**adapter_parameters(model), **adapter_buffers(model)} for model in models)
    assert loaded.keys() == later.keys() and len(loaded) > 10
    for key, tensor in loaded.items():
        assert later[key].device.type == "cpu" and torch.equal(later[key], tensor), key
    copied = [p for n, p in models[1].named_parameters() if "base_copies" in n]
    assert (len(copied) > 0) is (name == "copies") and not any(p.is_meta for p in copied)
    assert models[1].model.layers[1].self_attn.o_proj.weight.is_meta
    refuse_offloaded(models[1], "nothing")


def test_a_native_mixture_that_is_not_converted_lends_its_router_to_the_copy_that_trains(tmp_path):
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    models = load_model(of(tmp_path)), read_later(of(tmp_path))
    for model in models:
        torch.manual_seed(7)
        lmoe.inject(model, {"strategy": "native_moe_expert_lora", "lora_r": 4})
    loaded, later = (adapter_parameters(model) for model in models)
    assert any(".router.router." in name for name in loaded)
    assert all(torch.equal(later[name], tensor) for name, tensor in loaded.items())


def test_stand_ins_without_numbers_take_no_memory_and_go_again(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = read_later(of(tmp_path))
    meta = model.model.layers[0].mlp.up_proj.weight
    with weights_at(model, "model.layers.0.mlp", read=False):
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.shape == meta.shape and weight.device.type == "cpu" and weight.untyped_storage().nbytes() == 4
        assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert model.model.layers[0].mlp.up_proj.weight is meta


def changed(folder: Path, **more) -> None:
    """The files of a base with other tensors beside its own, or in their place."""
    tensors = load_file(folder / SAFE_WEIGHTS_NAME)
    save_file({**tensors, **more}, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})


def test_what_the_files_have_otherwise_than_the_model_is_said(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    changed(tmp_path, unknown=torch.ones(2))
    assert unread_model(of(tmp_path)) == "its files have other names of weights than the model, first unknown"
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    changed(tmp_path, **{"lm_head.weight": torch.ones(64, 32)})
    assert unread_model(of(tmp_path)) == "its files hold what other weights are tied to"
    tiny_model().save_pretrained(tmp_path)
    changed(tmp_path, **{"model.norm.weight": torch.ones(3)})
    assert unread_model(of(tmp_path)) == "model.norm.weight has the shape (3,) in its file, and (32,) in the model"
    changed(tmp_path, **{"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    assert unread_model(of(tmp_path)) == "model.norm.weight is stored as I8"


def test_files_of_other_kinds_are_left_to_transformers(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    assert unread_model(of(tmp_path)) == "it has no safetensors files"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    assert unread_model(of(tmp_path)) == "its weights are stored quantised"


def test_torn_weights_are_the_same_error_as_when_all_are_loaded(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / SAFE_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="the model cannot be loaded"):
        unread_model(of(tmp_path))
