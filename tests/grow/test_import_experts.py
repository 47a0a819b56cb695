"""Adapters become experts: exactly what peft computes, wherever the router sends a token."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lmoe
from lmoe.adapter.folder import adapter_tensors
from lmoe.errors import CheckpointError, ConfigError, InjectionError
from lmoe.injection.record import injected
from tests.tiny_models import randomise, tiny_model, tokens

DOMAINS = ["code", "chat", "none"]
ORACLE = {"router": "oracle", "domains": DOMAINS}
TARGETS = ["gate_proj", "up_proj", "down_proj", "q_proj"]
INJECTION = {
    "lora_r": 6,
    "lora_alpha": 10.0,
    "num_experts": 3,
    "lora_B_std": 0.5,
    "target_keywords": TARGETS,
    "attn_lora": {"enabled": False},
}


def peft_adapter(folder, *, seed: int, **settings) -> str:
    """An adapter that peft wrote, away from its start."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """Of unequal rank, scaling and targets; chat has another alpha at one Linear."""
    folder = tmp_path_factory.mktemp("adapters")
    chat = {"use_rslora": True, "alpha_pattern": {"up_proj": 5}, "target_modules": ["up_proj", "q_proj"]}
    return {
        "code": peft_adapter(folder / "code", seed=1, r=3, lora_alpha=7, target_modules=["gate_proj", "down_proj"]),
        "chat": peft_adapter(folder / "chat", seed=2, r=6, lora_alpha=4, **chat),
    }


def mixture(adapters, injection=INJECTION, moe=ORACLE):
    model = tiny_model()
    torch.manual_seed(3)
    lmoe.inject(model, injection, moe)
    lmoe.import_experts(model, adapters)
    return model


@pytest.mark.parametrize("name", ["code", "chat"])
def test_with_all_weight_on_an_expert_the_logits_are_those_of_peft_with_its_adapter(adapters, name):
    model, ids = mixture(adapters), tokens()
    with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=[name] * 2):
        found = model(ids).logits
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_model(), adapters[name]).eval()(ids).logits
        assert not torch.allclose(expected, tiny_model()(ids).logits, atol=0.1)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def test_noise_breaks_the_symmetry_of_new_experts_alone_and_names_are_kept(adapters):
    model = mixture(adapters)
    tensors = adapter_tensors(model)
    up, gate = "model.layers.0.mlp.up_proj.experts", "model.layers.0.mlp.gate_proj.experts"
    assert not tensors[f"{up}.0.lora_B"].any()  # code does not adapt it
    assert not tensors[f"{gate}.0.lora_B"][:, 3:].any() and tensors[f"{gate}.0.lora_A"][3:].any()
    assert tensors[f"{up}.2.lora_B"].std() > 0.3
    assert injected(model).expert_names == ("code", "chat", "expert2")


def test_names_go_with_the_adapter_and_its_experts_are_the_same_again(adapters, tmp_path):
    model = mixture(adapters)
    lmoe.save(model, tmp_path / "saved", base_model="x")
    again = tiny_model()
    from lmoe.adapter.folder import load_adapter, read_adapter_config

    config = read_adapter_config(tmp_path / "saved")
    assert config.expert_names == ["code", "chat", "expert2"] and "experts_from" not in config.injection
    lmoe.inject(again, config.injection, config.moe)
    load_adapter(again, tmp_path / "saved", config)
    assert injected(again).expert_names == ("code", "chat", "expert2")
    assert all(torch.equal(t, adapter_tensors(again)[name]) for name, t in adapter_tensors(model).items())


def test_a_dense_lora_adapter_of_lmoe_is_an_expert_too(tmp_path):
    dense = tiny_model()
    lmoe.inject(dense, {"strategy": "dense_lora", "lora_r": 2, "attn_lora": {"enabled": False}})
    randomise(dense)
    lmoe.save(dense, tmp_path / "dense", base_model="x")
    model, ids = mixture({"code": tmp_path / "dense"}), tokens()
    with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=["code"] * 2):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"target_keywords": None},
            r"experts_from.chat .* adapts model.layers.0.self_attn.q_proj, where no experts go; set "
            r"injection.target_keywords=\[gate_proj,up_proj,down_proj,q_proj\]",
        ),
        (
            {"target_keywords": None, "attn_lora": {"enabled": True}},
            r"where a single LoRA is, beside the experts; set injection.target_keywords=\[.*q_proj\] "
            r"injection.attn_lora.keywords=\[v_proj\]",
        ),
        ({"lora_r": 5}, r"chat .* has rank 6 at .*, and experts have 5 there; set injection.lora_r to at least 6"),
    ],
)  # fmt: skip
def test_a_branch_without_a_place_is_refused_with_the_settings_that_make_one(adapters, change, reason):
    before = {}
    model = tiny_model()
    lmoe.inject(model, INJECTION | change)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    with pytest.raises(CheckpointError, match=reason):
        lmoe.import_experts(model, adapters)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


def test_an_adapter_of_another_base_is_refused_by_the_first_difference(adapters):
    model = tiny_model(intermediate_size=40)
    lmoe.inject(model, INJECTION)
    with pytest.raises(CheckpointError, match="down_proj was trained for 48 in, 32 out; here it has 40 in, 32 out"):
        lmoe.import_experts(model, adapters)


def test_more_adapters_than_experts_and_names_that_are_none_are_all_told(adapters):
    model = tiny_model()
    lmoe.inject(model, INJECTION | {"num_experts": 2})
    with pytest.raises(ConfigError, match="names 3 adapters, and injection.num_experts leaves room for 2"):
        lmoe.import_experts(model, adapters | {"third": adapters["code"]})
    with pytest.raises(ConfigError, match=r"(?s)'../x' cannot be the name.*names code twice but for case"):
        lmoe.import_experts(model, {"../x": "a", "code": "b", "Code": "c"})


def test_inject_itself_reads_no_files_and_says_who_does():
    with pytest.raises(InjectionError, match=r"call lmoe.import_experts\(model, …\) after lmoe.inject"):
        lmoe.inject(tiny_model(), {"experts_from": {"code": "x"}})
