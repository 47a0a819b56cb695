"""moe.router_scope=model in training: one decision for all sites, as the loop over rows, turns and tokens makes it."""

import pytest
import torch

from tests.injection.model_scope import Reference, Rows, gradients_of, logits_of_rows, model_scope, projected

MIXED = ("pppaa", "pa", "ppppppppa", "paaaaaaa", "pppp", "ppaap")
"""Prompts of very different lengths, a text, a row that is all prompt, and one with something behind its answer."""
TURNS = ("ppaappa", "ppa", "pappappapp", "pppp", "paapapa")


def agree(model, rows: Rows, reference: Reference, *, packed=None) -> None:
    """Logits of every row, and gradients of every parameter, are those of the loop."""
    logits, _ = logits_of_rows(model, rows.batch(packed=packed))
    expected = [row.logits for row in reference.rows(rows)]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    own, wanted = gradients_of(model, projected(logits)), reference.gradients(projected(expected))
    assert wanted["router.weight"].any() and sum(bool(values.any()) for values in wanted.values()) >= 5
    for name, values in wanted.items():
        close = 1e-3 * float(values.abs().max()) + 1e-6  # sums of large parts
        torch.testing.assert_close(own[name], values, atol=close, rtol=1e-3, msg=lambda text, name=name: f"{name} {text}")


@pytest.mark.parametrize("prompt_experts", [False, True])
@pytest.mark.parametrize("packed", [None, [3, 1, 2]])
@pytest.mark.parametrize("decide", ["first", "turn"])
def test_a_training_forward_is_that_of_each_row_alone(prompt_experts, packed, decide):
    model = model_scope(moe={"prompt_experts": prompt_experts, "decide": decide})
    rows = Rows.of(*(MIXED if decide == "first" else (*TURNS, "ppa")))
    agree(model, rows, Reference.of(model), packed=packed)


FFN = {"strategy": "moe_expert_lora"}
OFF = {"attn_lora": {"enabled": False}}
CASES = {
    "llama": ({}, {"router_layer": 1}),
    "mistral": ({}, {"router_layer": 0, "prompt_experts": True}),
    "gpt2": ({}, {"router_layer": -3}),
    "gemma2": ({}, {"router_layer": 2}),
    "gemma3": ({}, {"router_layer": -2}),
    "gemma3_text": ({}, {"router_layer": 1, "prompt_experts": True}),
    "gpt_oss": ({"strategy": "mixture_lora", "target_keywords": ["o_proj"], **OFF}, {"prompt_experts": True}),
    "phi3": ({}, {"decide": "turn"}),
    "olmo2": ({}, {"router_layer": -2}),
    "qwen2_moe": ({}, {}),
    "mixtral": ({}, {"decide": "turn"}),
    "qwen3_moe": ({}, {"prompt_experts": True}),
    "qwen3_5_text": ({}, {"router_layer": 2}),
}


@pytest.mark.parametrize("family", CASES)
def test_every_family_is_read_where_router_layer_says(family):
    injection, moe = CASES[family]
    model, rows = model_scope(family, injection=injection, moe=moe), Rows.of(*MIXED, *TURNS[:1])
    agree(model, rows, Reference.of(model, family))


@pytest.mark.parametrize(
    ("injection", "moe"),
    [
        ({"top_k": 1}, {}),
        ({"top_k": 1}, {"scale": "unit"}),
        ({"top_k": 3}, {"scale": "raw", "temperature": 2.0}),
        ({"shared_lora_r": 2}, {}),
        ({"shared_lora_r": 2}, {"prompt_experts": True}),
        ({"shared_lora_A": True}, {}),
        ({"use_rslora": True}, {}),
        ({"strategy": "moe_expert_lora"}, {}),
        ({"strategy": "moe_expert_lora"}, {"prompt_experts": True}),
        ({"strategy": "moe_expert_lora", "top_k": 1}, {"decide": "turn", "scale": "unit"}),
        ({"strategy": "moe_expert_lora", "share_base": False}, {}),
        ({"target_keywords": ["o_proj", "up_proj"], "attn_lora": {"enabled": True, "keywords": ["k_proj"]}}, {}),
        ({}, {"backend": "grouped"}),
        ({"layer_indices": [1]}, {"router_layer": 0}),
    ],
)
def test_every_way_of_adding_experts_leaves_the_prompt_alone(injection, moe):
    model, rows = model_scope(injection=injection, moe=moe), Rows.of(*MIXED, TURNS[0])
    agree(model, rows, Reference.of(model))
