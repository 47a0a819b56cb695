"""Runs with a phase that trains the backbone's feed-forward blocks: what moves, what is saved, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import read_adapter_config
from lmoe.errors import ConfigError
from lmoe.run.parts import base_ffn_parameters, check_base_training
from tests.metric_names import names, rows, undocumented
from tests.run.ended import FAST, keep_model, logits
from tests.tiny_models import tiny_model

SETTINGS = {
    "dense_lora": (
        "model",
        "injection=dense_lora",
        "phase=adapters",
        "phase.phases.adapters.trainable=[lora,base_ffn]",
    ),
    "mixture_lora": ("model", "injection=mixture_lora", "phase=joint", "phase.phases.joint.trainable=[lora,base_ffn]"),
    "moe_expert_lora": (
        "model",
        "injection=moe_expert_lora",
        "injection.share_base=false",
        "phase=joint",
        "phase.phases.joint.trainable=[router,lora,base_ffn]",
    ),
    "native_moe_expert_lora": (
        "native",
        "injection=native_moe_expert_lora",
        "phase=joint",
        "phase.phases.joint.trainable=[router,lora,base_ffn]",
    ),
}
FFN = re.compile(r"\.mlp\.(gate_proj|up_proj|down_proj|experts\.gate_up_proj|experts\.down_proj)(\.weight)?$")
COPIED = re.compile(r"\.mlp\.base_copies\.(gate_proj|up_proj|down_proj)\.weight$")


def overrides(micro, strategy: str) -> list[str]:
    backbone, *given = SETTINGS[strategy]
    return [f"backbone.model_name={getattr(micro, backbone)}", *given, *FAST]


def base_of(micro, strategy: str) -> Path:
    return getattr(micro, SETTINGS[strategy][0])


@pytest.mark.parametrize("strategy", SETTINGS)
def test_the_blocks_train_are_saved_and_load_with_the_logits_of_the_run(train, micro, monkeypatch, strategy):
    kept = keep_model(monkeypatch)
    done = train(*overrides(micro, strategy), "checkpoint.save_base=true")
    assert done.code == 0, done.text
    first, *_, last = rows(done.run)
    assert last["val/loss"] < first["val/loss"] - 0.02
    assert {"lr/base_ffn", "grad_norm/base_ffn"} <= set(names(done.run)) and undocumented(names(done.run)) == []
    assert read_adapter_config(done.run / "adapter").trained_base == ["base_ffn"]

    original = AutoModelForCausalLM.from_pretrained(base_of(micro, strategy)).state_dict()
    stored = load_file(done.run / "adapter" / "adapter.safetensors")
    pattern = COPIED if strategy == "moe_expert_lora" else FFN
    blocks = {name: tensor for name, tensor in stored.items() if pattern.search(name)}
    assert len(blocks) == (4 if strategy == "native_moe_expert_lora" else 6)
    for name, tensor in blocks.items():
        before = original[name.replace(".base_copies.", ".")]
        if strategy == "moe_expert_lora":
            assert all(not torch.equal(copy, before) for copy in tensor) and tensor.shape == (4, *before.shape)
            assert not torch.equal(tensor[0], tensor[1])
        else:
            assert tensor.shape == before.shape and not torch.equal(tensor, before)

    model, tokenizer = lmoe.load(done.run)
    trained = kept[0].eval().requires_grad_(False)  # as the loaded base is: a base that trains takes other matmuls
    assert torch.equal(logits(model), logits(trained))
    assert model.generate(**tokenizer("math 3:", return_tensors="pt"), max_new_tokens=3).shape[1] > 3

    base = AutoModelForCausalLM.from_pretrained(done.run / "base")
    stored_base = base.state_dict()
    assert stored_base.keys() == original.keys()
    moved = {name for name in original if not torch.equal(original[name], stored_base[name])}
    assert moved == (set() if strategy == "moe_expert_lora" else set(blocks))
    for name in moved:
        assert torch.equal(stored_base[name], blocks[name])
    over_it, _ = lmoe.load(done.run, base_model=str(done.run / "base"))
    assert torch.equal(logits(over_it), logits(model))


def test_a_phase_that_adds_base_ffn_trains_it_from_there_on_beside_what_trained_before(train):
    experts = "phase.phases.experts"
    added = (f"{experts}.start=4", f"{experts}.mode=add", f"{experts}.trainable=[lora,base_ffn]")
    done = train("injection=moe_expert_lora", "injection.share_base=false", *added, *FAST)
    assert done.code == 0, done.text
    assert "phase experts: steps 5 to 6 train base_ffn, lora, router" in done.text
    by_step = {int(row["step"]): row for row in rows(done.run)}
    for role, first in (("router", 1), ("lora", 5), ("base_ffn", 5)):
        steps = [step for step in range(1, 7) if f"grad_norm/{role}" in by_step[step]]
        assert steps == list(range(first, 7)), role


@pytest.mark.parametrize(
    ("strategy", "precision", "parameters"),
    [
        ("dense_lora", "float16", 2 * 3 * 32 * 48),
        ("mixture_lora", "bfloat16", 2 * 3 * 32 * 48),
        ("moe_expert_lora", "bfloat16", 4 * 2 * 3 * 32 * 48),
        ("native_moe_expert_lora", "bfloat16", 2 * 4 * 3 * 32 * 16),
    ],
)
def test_less_than_float32_is_refused_with_what_float32_would_take(train, micro, strategy, precision, parameters):
    done = train(*overrides(micro, strategy), f"backbone.precision={precision}")
    assert done.code == 1 and "Traceback" not in done.text
    assert f"a phase trains base_ffn, and backbone.precision={precision} would round its steps away" in done.text
    assert f"{parameters:,} parameters would take 0.00 GB in float32" in done.text
    assert "set backbone.precision=float32, or take these roles out of the phases" in done.text
    assert not (done.run / "adapter").exists()


@pytest.mark.parametrize(
    ("strategy", "gigabytes"),
    [  # 4 bytes of 36 blocks of 3 * 4096 * 12288 numbers, of 4 copies of them, or of 128 experts of 3 * 2048 * 768
        ("dense_lora", 4 * 36 * 3 * 4096 * 12288 / 1e9),
        ("moe_expert_lora", 4 * 4 * 36 * 3 * 4096 * 12288 / 1e9),
        ("native_moe_expert_lora", 4 * 48 * 128 * 3 * 2048 * 768 / 1e9),
    ],
)
def test_the_gigabytes_are_those_of_what_would_train(micro, strategy, gigabytes):
    """On models of the size of Qwen3-8B and Qwen3-30B-A3B, without their numbers."""
    if strategy == "native_moe_expert_lora":
        sizes = {"num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
        config = AutoConfig.for_model("qwen3_moe", **sizes)
    else:
        sizes = {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288}
        config = AutoConfig.for_model("qwen3", **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    run = micro.config(*overrides(micro, strategy), "backbone.precision=bfloat16")
    said = f"would take {gigabytes:.2f} GB in float32, and {3 * gigabytes:.2f} GB for their gradients and AdamW's"
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_base_training(run, model)


@pytest.mark.parametrize("family", ["qwen3", "phi", "gpt2", "gemma4_moe", "gpt_oss", "qwen2_moe"])
def test_the_parameters_counted_beforehand_are_those_that_get_the_role(family):
    from lmoe.injection.roles import role_table

    native = family in ("gemma4_moe", "gpt_oss", "qwen2_moe")
    for injection in (
        {"strategy": "dense_lora"},
        {"strategy": "mixture_lora"},
        {"strategy": "native_moe_expert_lora"} if native else {"strategy": "moe_expert_lora", "share_base": False},
        {} if native else {"strategy": "moe_expert_lora", "share_base": False, "layer_indices": [1]},
    ):
        model = tiny_model(family)
        counted = base_ffn_parameters(model, lmoe.plan(model, injection))
        lmoe.inject(model, injection)
        assert counted == next(total for role, total, _ in role_table(model) if role == "base_ffn"), injection


def test_base_ffn_on_one_shared_base_is_refused_before_anything_is_loaded(train):
    done = train("injection=moe_expert_lora", "phase=joint", "phase.phases.joint.trainable=[lora,base_ffn]")
    assert done.code == 1
    assert "base_ffn cannot train with injection.share_base=true" in done.text
