"""What is exported gives the same logits in `peft`, and comes back as it went."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lmoe
from lmoe.errors import CheckpointError
from lmoe.injection.roles import adapter_parameters
from lmoe.peft.adapter import CONFIG_FILE, WEIGHTS_FILE, load_peft, save_peft
from tests.tiny_models import randomise, tiny_model, tokens

DENSE = {"strategy": "dense_lora", "lora_r": 3}
NATIVE = {"strategy": "native_moe_expert_lora", "lora_r": 3, "attn_lora": {"lora_r": 2, "lora_alpha": 5.0}}
CASES = {
    "plain LoRA": ("qwen3", DENSE),
    "rsLoRA": ("qwen3", DENSE | {"use_rslora": True}),
    "ranks by layer": ("qwen3", DENSE | {"lora_r_by_layer": [2, 5]}),
    "another rank and alpha on attention": ("qwen3", DENSE | {"attn_lora": {"lora_r": 2, "lora_alpha": 5.0}}),
    "DoRA on attention alone": ("qwen3", DENSE | {"target_keywords": [], "attn_lora": {"use_dora": True}}),
    "Conv1D": ("gpt2", DENSE),
    "experts": ("qwen3_moe", NATIVE),
    "experts of one fused tensor": ("qwen3_moe", NATIVE | {"target_keywords": ["down_proj"]}),
    "transposed experts with biases": ("gpt_oss", NATIVE),
    "experts beside a shared one with LoRA": (
        "qwen2_moe",
        NATIVE | {"target_keywords": ["experts.gate_up_proj", "up_proj"]},
    ),
    "experts behind dense layers": ("deepseek_v3", NATIVE),
}


def trained(family: str, injection: dict):
    model = tiny_model(family)
    lmoe.inject(model, injection)
    randomise(model, std=0.2)
    return model


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path: Path):
    family, injection = CASES[request.param]
    model = trained(family, injection)
    return family, injection, model, save_peft(model, tmp_path / "peft", base_model=family)


@pytest.mark.filterwarnings("ignore:.*did not match any.*:RuntimeWarning")
def test_peft_itself_loads_it_and_gives_the_same_logits(case):
    family, _, model, folder = case
    with torch.no_grad():
        expected = model(tokens()).logits
        wrapped = PeftModel.from_pretrained(tiny_model(family), folder).eval()
        assert not torch.allclose(expected, tiny_model(family)(tokens()).logits, atol=1e-2)
        torch.testing.assert_close(wrapped(tokens()).logits, expected, atol=2e-5, rtol=1e-5)


def test_export_then_import_is_the_identity(case):
    family, injection, model, folder = case
    fresh = tiny_model(family)
    lmoe.inject(fresh, injection)
    load_peft(fresh, folder)
    own, back = adapter_parameters(model), adapter_parameters(fresh)
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)


def test_an_adapter_without_the_routers_leaves_those_of_the_backbone(tmp_path):
    model = trained("qwen3_moe", NATIVE)
    folder = save_peft(model, tmp_path, base_model="x")
    tensors = {name: t for name, t in load_file(folder / WEIGHTS_FILE).items() if ".gate." not in name}
    save_file(tensors, folder / WEIGHTS_FILE)
    fresh = tiny_model("qwen3_moe")
    lmoe.inject(fresh, NATIVE)
    load_peft(fresh, folder)
    gate = fresh.model.layers[0].mlp.gate
    assert torch.equal(gate.router.weight, gate.base_layer.weight)


@pytest.mark.parametrize(
    ("family", "injection", "reason"),
    [
        ("qwen3", {}, "injection=mixture_lora chooses experts for each token.*; export .* `export_peft_experts`"),
        (
            *("qwen3", {"strategy": "moe_expert_lora"}),
            "injection=moe_expert_lora chooses experts for each token.*; use the adapter as it is",
        ),
        ("qwen3", DENSE | {"attn_lora": {"use_dora": True}}, "DoRA on all targets or none"),
    ],
)
def test_what_peft_cannot_express_is_refused_with_the_reason_and_what_can_be_done(family, injection, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        save_peft(trained(family, injection), tmp_path / "peft", base_model=family)
    assert not (tmp_path / "peft").exists()


def test_a_backbone_that_was_trained_itself_is_refused(tmp_path):
    model = tiny_model()
    lmoe.inject(model, DENSE, trained_base=["base_ffn"])
    with pytest.raises(CheckpointError, match="base_ffn of the backbone was trained too; a PEFT"):
        save_peft(model, tmp_path, base_model="x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 9}, "r is 9, and this injection has 3"),
        ({"lora_alpha": 1}, "lora_alpha is 1, and this injection has 32.0"),
        ({"use_rslora": True}, "use_rslora is True, and this injection has False"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and this injection has 'LORA'"),
    ],
)
def test_an_adapter_with_other_settings_is_refused_by_key(change, reason, tmp_path):
    model = trained("qwen3", DENSE)
    config = save_peft(model, tmp_path, base_model="x") / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match=reason):
        load_peft(model, tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    model = trained("qwen3_moe", NATIVE)
    tensors = load_file(save_peft(model, tmp_path, base_model="x") / WEIGHTS_FILE)
    first = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    for changed, reason in (
        (
            {name: t for name, t in tensors.items() if name != first},
            f"lacks 1 tensors of this injection, first {first}",
        ),
        (tensors | {"a.lora_A.weight": torch.zeros(1)}, "holds 1 tensors without a place here, first a.lora_A.weight"),
        (tensors | {first: tensors[first].t().contiguous()}, "experts the other way round"),
    ):
        save_file(changed, tmp_path / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=reason):
            load_peft(model, tmp_path)


def test_a_folder_without_an_adapter_or_with_a_torn_one_is_one_clear_error(tmp_path):
    model = trained("qwen3", DENSE)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        load_peft(model, tmp_path)
    weights = save_peft(model, tmp_path, base_model="x") / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_peft(model, tmp_path)
