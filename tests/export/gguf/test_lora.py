"""A LoRA adapter as llama.cpp reads it: what it adds to each weight is what PEFT adds, to the last bit that counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lmoe.errors import BackboneError, CheckpointError
from lmoe.export.gguf.lora import write_gguf_lora
from lmoe.export.gguf.model import write_gguf
from lmoe.peft.reader import read_expert
from lmoe.vocabulary import GgufType
from tests.export.gguf.folders import contents, save_family
from tests.gguf_file import need_gguf

LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2_moe": ["q_proj", "v_proj", "shared_expert.up_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
PLAIN = {"r": 4, "lora_alpha": 6}
MIXED = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}


@pytest.fixture(autouse=True)
def _gguf():
    need_gguf()


def adapter_over(base: Path, folder: Path, *, targets: list[str], embedding_layers=False, **settings) -> Path:
    """A PEFT adapter away from its start."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets, **settings)
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=embedding_layers)
    return folder


def added(metadata: dict, tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What llama.cpp adds to a weight: alpha / R * B A, in its numbers."""
    down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    scale = np.float32(metadata["adapter.lora.alpha"]) / np.float32(down.shape[0])
    return scale * (up.astype(np.float32) @ down.astype(np.float32))


@pytest.mark.parametrize("settings", [PLAIN, MIXED], ids=["plain", "rsLoRA, ranks and alphas by module"])
@pytest.mark.parametrize("family", LINEARS)
def test_what_is_added_to_each_weight_is_what_peft_merges_into_it(family, settings, tmp_path):
    save_family(family, tmp_path / "base")
    adapter_over(tmp_path / "base", tmp_path / "peft", targets=LINEARS[family], **settings)
    done = write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf", str(tmp_path / "base"))
    metadata, lora = contents(done.file)
    _, before = contents(write_gguf(tmp_path / "base", tmp_path / "base.gguf", GgufType.f32))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in (tmp_path / "base").glob("*token*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    _, after = contents(write_gguf(tmp_path / "merged", tmp_path / "merged.gguf", GgufType.f32))
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    assert metadata["general.architecture"] == contents(tmp_path / "base.gguf")[0]["general.architecture"]
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert len(changed) == 2 * len(LINEARS[family]) == len(done.ranks)
    for name in changed:
        np.testing.assert_allclose(added(metadata, lora, name), after[name] - before[name], atol=1e-5)


def test_with_one_rank_and_alpha_no_number_is_changed(tmp_path):
    save_family("qwen3", tmp_path / "base")
    adapter_over(tmp_path / "base", tmp_path / "peft", targets=["v_proj"], r=8, lora_alpha=6, use_rslora=True)
    metadata, lora = contents(write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf", str(tmp_path / "base")).file)
    stored = read_expert(tmp_path / "peft").branches
    assert metadata["adapter.lora.alpha"] == np.float32(6 / np.sqrt(8) * 8)
    for path, branch in stored.items():
        layer = path.split(".")[2]
        np.testing.assert_array_equal(lora[f"blk.{layer}.attn_v.weight.lora_a"], branch.lora_A.numpy())
        np.testing.assert_array_equal(lora[f"blk.{layer}.attn_v.weight.lora_b"], branch.lora_B.numpy())


def test_in_float16_all_of_it_is(tmp_path):
    save_family("qwen3", tmp_path / "base")
    adapter_over(tmp_path / "base", tmp_path / "peft", targets=["v_proj"], **PLAIN)
    file = write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf", str(tmp_path / "base"), GgufType.f16).file
    assert {tensor.dtype.name for tensor in contents(file)[1].values()} == {"float16"}


def test_an_adapter_without_a_base_or_for_another_one_is_refused(tmp_path):
    save_family("qwen3", tmp_path / "base")
    save_family("qwen3", tmp_path / "other", hidden_size=64)
    save_family("gpt2", tmp_path / "gpt2")
    adapter_over(tmp_path / "base", tmp_path / "peft", targets=["v_proj"], **PLAIN)
    with pytest.raises(CheckpointError, match=r"was trained for 32 in, 16 out; here it has 64 in"):
        write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf", str(tmp_path / "other"))
    adapter_over(tmp_path / "gpt2", tmp_path / "for_gpt2", targets=["c_attn"], fan_in_fan_out=True, **PLAIN)
    with pytest.raises(BackboneError, match="GPT2LMHeadModel is not written as GGUF"):
        write_gguf_lora(tmp_path / "for_gpt2", tmp_path / "lora.gguf", str(tmp_path / "gpt2"))
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not name its base; give `base_model`"):
        write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_is_adapted_unless_it_is_the_embedding(tmp_path):
    for tied in (False, True):
        base, peft = tmp_path / f"base{tied}", tmp_path / f"peft{tied}"
        save_family("qwen3", base, tie_word_embeddings=tied)
        adapter_over(base, peft, targets=["v_proj", "lm_head"], **PLAIN)
    done = write_gguf_lora(tmp_path / "peftFalse", tmp_path / "lora.gguf", str(tmp_path / "baseFalse"))
    assert set(done.ranks) == {"blk.0.attn_v", "blk.1.attn_v", "output"}
    with pytest.raises(CheckpointError, match=r"lm_head cannot be changed in llama.cpp"):
        write_gguf_lora(tmp_path / "peftTrue", tmp_path / "tied.gguf", str(tmp_path / "baseTrue"))


def test_an_adapter_that_brings_weights_of_the_base_is_refused(tmp_path):
    save_family("qwen3", tmp_path / "base")
    adapter_over(tmp_path / "base", tmp_path / "peft", targets=["v_proj", "lm_head"], embedding_layers=True, **PLAIN)
    with pytest.raises(
        CheckpointError, match=r"holds weights of the base too \(lm_head\).*save_embedding_layers=False"
    ):
        write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf", str(tmp_path / "base"))


def test_an_adapter_that_does_nothing_is_refused(tmp_path):
    save_family("qwen3", tmp_path / "base")
    adapter_over(tmp_path / "base", tmp_path / "peft", targets=["v_proj"], r=4, lora_alpha=0)
    with pytest.raises(CheckpointError, match="every scaling is 0"):
        write_gguf_lora(tmp_path / "peft", tmp_path / "lora.gguf", str(tmp_path / "base"))
