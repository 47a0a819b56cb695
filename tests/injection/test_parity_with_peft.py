"""One expert, and plain LoRA, are PEFT LoRA: outputs and gradients, in training mode, weights copied."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lmoe
from tests.tiny_models import randomise, tiny_model, tokens

FFN, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("keywords", "injection"),
    [
        (FFN, {"num_experts": 1, "top_k": 1, "attn_lora": {"enabled": False}}),
        (ATTENTION, {"num_experts": 1, "top_k": 1, "target_keywords": ATTENTION, "attn_lora": {"enabled": False}}),
        (FFN + ATTENTION, {"num_experts": 1, "top_k": 1}),
    ],
    ids=["mixtures on the FFN", "mixtures on attention", "mixtures on the FFN and single LoRA on attention"],
)
def test_one_expert_and_single_lora_equal_peft_in_outputs_and_gradients(keywords, injection):
    agree(tiny_model(), keywords, injection)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "keywords", "injection"),
    [
        ("qwen3", FFN + ATTENTION, {}),
        ("qwen3", FFN, {"attn_lora": {"enabled": False}}),
        ("qwen3", ATTENTION, {"target_keywords": []}),
        ("qwen3", ["o_proj"], {"target_keywords": ["o_proj"], "attn_lora": {"enabled": False}}),
        ("phi3", ["qkv_proj", "gate_up_proj", "down_proj"], {}),
        ("gpt2", ["attn.c_attn", "c_fc", "mlp.c_proj"], {}),
    ],
    ids=["FFN and attention", "FFN alone", "attention alone", "a Linear by its name", "fused", "Conv1D"],
)
def test_dense_lora_equals_peft_in_outputs_and_gradients(family, keywords, injection, use_rslora):
    agree(tiny_model(family), keywords, {"strategy": "dense_lora", "use_rslora": use_rslora, **injection})


def agree(model: PreTrainedModel, keywords: list[str], injection: dict) -> None:
    """PEFT adapts the Linears of the keywords; the injection must adapt the same, under the same names."""
    conv1d = {"fan_in_fan_out": True} if model.config.model_type == "gpt2" else {}
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=keywords,
        use_rslora=injection.get("use_rslora", False),
        task_type="CAUSAL_LM",
        **conv1d,
    )
    theirs = get_peft_model(copy.deepcopy(model), settings).train()
    lmoe.inject(model, injection={"lora_r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **injection})
    model.train()
    randomise(model)
    peft_parameters = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert ours.keys() == peft_parameters.keys()
    with torch.no_grad():
        for name, parameter in peft_parameters.items():
            parameter.copy_(ours[name].reshape(parameter.shape))

    embedded = model.get_input_embeddings()(tokens()).detach()
    gradients = []
    for candidate in (model, theirs):
        x = embedded.clone().requires_grad_()
        logits = candidate(inputs_embeds=x).logits
        logits.square().mean().backward()
        gradients.append((logits.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    for name, parameter in ours.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(
            parameter.grad.reshape(peft_parameters[name].shape), peft_parameters[name].grad, atol=1e-5, rtol=1e-4
        )
