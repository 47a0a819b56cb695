"""A Hugging Face folder as a GGUF file: what is in it, that it computes the same, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError, CheckpointError
from lmoe.export.gguf.model import write_gguf
from lmoe.vocabulary import GgufType
from tests.export.gguf.folders import MIXTURES, ROWS, VOCAB, contents, save_family
from tests.gguf_file import need_gguf, save_qwen2
from tests.gguf_file import write_gguf as write_by_hand

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
READ_BY_TRANSFORMERS = {
    "llama": {},
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768},
}
"""With sizes that Transformers 5.23 does not read from the file, and leaves at their defaults."""


@pytest.fixture(autouse=True)
def _gguf():
    need_gguf()


def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_of_the_file_as_of_the_folder(family, tmp_path):
    model = save_family(family, tmp_path / "model", **READ_BY_TRANSFORMERS[family])
    file = write_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufType.f32)
    again = load_model(BackboneConfig(model_name=str(file)))
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_sizes_and_every_number_are_in_the_file(family, tmp_path):
    model = save_family(family, tmp_path / "model")
    metadata, tensors = contents(write_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufType.f32))
    name, config = ARCHITECTURES[family], model.config
    assert metadata["general.architecture"] == name and metadata["general.type"] == "model"
    sizes = {
        "block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "context_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "vocab_size": ROWS,
    }
    assert {key: metadata[f"{name}.{key}"] for key in sizes} == sizes
    assert metadata[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert metadata[f"{name}.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert (f"{name}.expert_count" in metadata) == (family in MIXTURES)
    if family in MIXTURES:
        assert (metadata[f"{name}.expert_count"], metadata[f"{name}.expert_used_count"]) == (4, 2)
        state = model.state_dict()
        for layer in range(2):
            gate, up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
            down = state[f"model.layers.{layer}.mlp.experts.down_proj"]
            for part, expected in {"gate": gate, "up": up, "down": down}.items():
                np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_{part}_exps.weight"], expected.numpy())
    assert sum(tensor.size for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_heads_of_llama_are_in_the_order_that_llama_cpp_rotates(family, tmp_path):
    changes = {"attention_bias": True} if family == "llama" else {}
    model = save_family(family, tmp_path / "model", **changes)
    _, tensors = contents(write_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufType.f32))
    attention = model.model.layers[1].self_attn
    for name, module, heads in (("q", attention.q_proj, 4), ("k", attention.k_proj, 2)):
        moved = [h * 8 + half * 4 + i for h in range(heads) for i in range(4) for half in range(2)]  # 0 4 1 5 2 6 3 7 …
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.weight"], module.weight.detach()[moved].numpy())
        if family == "llama":
            np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.bias"], module.bias.detach()[moved].numpy())
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], attention.v_proj.weight.detach().numpy())


def test_the_frequencies_of_llama_3_are_divided_as_transformers_does(tmp_path):
    model = save_family("llama", tmp_path / "model", rope_parameters=LLAMA3, head_dim=32)
    _, tensors = contents(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    plain = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert tensors["rope_freqs.weight"].max() == 8.0 and tensors["rope_freqs.weight"].min() == 1.0


def test_a_stretched_rotation_is_said(tmp_path):
    stretched = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    save_family("qwen3", tmp_path / "model", rope_parameters=stretched)
    metadata, _ = contents(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    assert (metadata["qwen3.rope.scaling.type"], metadata["qwen3.rope.scaling.factor"]) == ("linear", 4.0)


def test_in_float16_vectors_and_routers_stay_as_they_were(tmp_path):
    save_family("qwen2_moe", tmp_path / "model")
    metadata, tensors = contents(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    exact = {name for name, tensor in tensors.items() if tensor.dtype == np.float32}
    assert exact == {name for name in tensors if tensors[name].ndim == 1 or "ffn_gate_inp" in name}
    assert all(tensors[name].dtype == np.float16 for name in tensors.keys() - exact)
    assert (metadata["general.file_type"], len(tensors) - len(exact)) == (1, 2 + 2 * 10)


def test_a_writer_of_other_hands_writes_the_same(tmp_path, micro):
    folder = save_qwen2(tmp_path / "model", micro.model)
    ours, own = contents(write_gguf(folder, tmp_path / "ours.gguf", GgufType.f32))
    theirs, other = contents(write_by_hand(folder, tmp_path / "theirs.gguf"))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        np.testing.assert_array_equal(tensor, other[name])
    apart = {"general.name"} | {name for name in theirs if name.startswith("GGUF.")}
    assert {name: ours[name] for name in theirs.keys() - apart} == {n: v for n, v in theirs.items() if n not in apart}


def test_a_folder_of_many_shards_gives_the_same_bytes(tmp_path):
    save_family("qwen3_moe", tmp_path / "one")
    save_family("qwen3_moe", tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one = write_gguf(tmp_path / "one", tmp_path / "a" / "model.gguf")
    many = write_gguf(tmp_path / "many", tmp_path / "b" / "model.gguf")
    assert one.read_bytes() == many.read_bytes()


def test_fused_experts_in_the_files_are_those_of_experts_one_by_one(tmp_path):
    model = save_family("qwen2_moe", tmp_path / "apart")
    shutil.copytree(tmp_path / "apart", tmp_path / "fused")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    apart = write_gguf(tmp_path / "apart", tmp_path / "a" / "model.gguf")
    fused = write_gguf(tmp_path / "fused", tmp_path / "b" / "model.gguf")
    assert apart.read_bytes() == fused.read_bytes()


def test_the_tiny_base_is_written_by_its_name_with_its_words(tmp_path):
    file = write_gguf("tiny", tmp_path / "tiny.gguf")
    metadata, tensors = contents(file)
    own = load_tokenizer(BackboneConfig(model_name="tiny"))
    assert metadata["tokenizer.ggml.pre"] == "qwen2" and len(metadata["tokenizer.ggml.tokens"]) == 4096
    assert metadata["tokenizer.chat_template"] == own.chat_template
    assert "output.weight" not in tensors  # it is the embedding
    assert file.stat().st_size < 1.01 * sum(tensor.nbytes for tensor in tensors.values()) + 300_000


REFUSED = {
    "another class": ("gpt2", {}, "GPT2LMHeadModel is not written as GGUF; these are: LlamaForCausalLM, Mixtral"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu (silu is there)"),
    "a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 (null is there)"),
    "Mixtral's window": ("mixtral", {"sliding_window": 8}, "sliding_window=8 (null is there)"),
    "weights that do not add up to 1": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=false (true is there)"),
    "weights that add up to 1": ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=true (false is there)"),
    "layers without experts": ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts"),
    "another rotation": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type=yarn (default, linear are there)",
    ),
    "biases that llama.cpp has not": ("qwen3", {"attention_bias": True}, "8 weights are no part of this architecture"),
    "biases that llama.cpp wants": ("qwen2_moe", {"qkv_bias": False}, "self_attn.q_proj.bias is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_and_nothing_is_left(case, tmp_path):
    family, changes, reason = REFUSED[case]
    model = save_family(family, tmp_path / "model", **changes)
    del model
    with pytest.raises(BackboneError) as refusal:
        write_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert reason in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_every_setting_that_does_not_fit_is_named_at_once(tmp_path):
    save_family("qwen3_moe", tmp_path / "model", norm_topk_prob=False, hidden_act="gelu")
    with pytest.raises(BackboneError, match=r"hidden_act=gelu.*norm_topk_prob=false"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_a_weight_that_lacks_or_is_left_over_is_named(tmp_path):
    save_family("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if "layers.1.mlp.up" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    save_file(whole | {"score.weight": torch.zeros(2, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"1 weights are no part .*score.weight"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize(("value", "reason"), [(1e5, "too large for f16; write `gguf_type=f32`"), (np.nan, "NaN")])
def test_numbers_that_the_type_cannot_hold_are_refused_and_nothing_is_left(value, reason, tmp_path):
    save_family("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = load_file(file)
    whole["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=rf"blk.1.ffn_up.weight.*{reason}"):
        write_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_and_files_in_the_way_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    save_family("llama", tmp_path / "model")
    (tmp_path / "there.gguf").write_text("mine")
    for output, reason in (
        ("there.gguf", "is there already"),
        ("model.bin", "must be the name of a file that ends in"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            write_gguf(tmp_path / "model", tmp_path / output)
    full = shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr("lmoe.export.gguf.file.shutil.disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match=r"0.1 GB are needed and 0.0 GB are free"):
        write_gguf(tmp_path / "model", tmp_path / "full" / "model.gguf")
    assert list((tmp_path / "full").iterdir()) == []
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_places_without_a_model_are_refused(tmp_path):
    save_family("llama", tmp_path / "model")
    file = write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    for place, reason in (
        (str(file), "is a GGUF file already"),
        ("owner/model", "is no local directory; download it first, with hf download"),
        (str(tmp_path / "nowhere"), "no such model directory"),
    ):
        with pytest.raises(BackboneError, match=reason):
            write_gguf(place, tmp_path / "other.gguf")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"neither model.safetensors nor"):
        write_gguf(tmp_path / "model", tmp_path / "other.gguf")


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path):
    save_family("llama", tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other/model.safetensors"}}))
    with pytest.raises(BackboneError, match=r"which is no file of this folder"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_without_the_package_gguf_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lmoe.export.gguf.file.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"pip install 'lmoe\[gguf\]'"):
        write_gguf(Path("tiny"), tmp_path / "model.gguf")


def test_rows_without_a_token_are_unused_and_special_tokens_are_control(tmp_path):
    save_family("qwen3", tmp_path / "model")
    metadata, _ = contents(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    types = metadata["tokenizer.ggml.token_type"]
    assert len(types) == ROWS
    assert [number for number, kind in enumerate(types) if kind == 3] == [0, 1, 2, 3]
