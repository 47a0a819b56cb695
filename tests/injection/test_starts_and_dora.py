"""How experts start (svd, rsLoRA scaling), and DoRA on attention, against PEFT and dense formulas."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import lmoe
from lmoe.errors import InjectionError
from lmoe.injection.record import mixtures
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.ops.dora import weight_row_norms
from lmoe.ops.lora import svd_slices
from tests.injection.tiny_injected import BY_DOMAIN, DOMAINS, ROUTERS, gradients, traced
from tests.reference import dumb_layer
from tests.tiny_models import randomise, tiny_model, tokens

ATTENTION = ["q_proj", "v_proj"]
FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)


# --- DoRA


@FEW
@given(
    out=st.integers(1, 5),
    width=st.integers(1, 5),
    rank=st.integers(1, 3),
    scaling=st.floats(0.1, 4),
    double=st.booleans(),
)
def test_weight_row_norms_and_their_gradients_are_those_of_the_dense_sum(out, width, rank, scaling, double):
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(out * 7 + width)
    leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((out, width), (rank, width), (out, rank))]
    ours, dense = weight_row_norms(*leaves, scaling), dumb_layer.row_norms(*leaves, scaling)
    assert ours.dtype == dtype
    tolerance = {"atol": 1e-9, "rtol": 1e-9} if double else {"atol": 5e-4, "rtol": 5e-4}
    torch.testing.assert_close(ours, dense, **tolerance)
    if float(dense.detach().min()) > 0.3:
        along = torch.randn_like(dense)
        both = [torch.autograd.grad(norms, leaves, along) for norms in (ours, dense)]
        torch.testing.assert_close(both[0], both[1], **{name: 20 * value for name, value in tolerance.items()})


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_attention_equals_peft_in_outputs_and_gradients(use_dora, use_rslora):
    """Single LoRA with DoRA and rsLoRA on and off, in training mode, away from the start."""
    model = tiny_model(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    theirs = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(
            r=4, lora_alpha=6, target_modules=ATTENTION, use_dora=use_dora, use_rslora=use_rslora, task_type="CAUSAL_LM"
        ),
    ).train()
    # The router of a mixture cannot be left out: its experts start, and stay, at zero.
    lmoe.inject(model, {"lora_r": 4, "lora_alpha": 6, "use_rslora": use_rslora, "attn_lora": {"use_dora": use_dora}})
    model.train()
    ours = {name: p for name, p in model.named_parameters() if "self_attn" in name and "lora_" in name}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.1 * noise) if "magnitude" in name else 0.3 * noise)
    peft = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    peft = {name.replace("lora_magnitude_vector", "lora_magnitude"): p for name, p in peft.items()}
    assert ours.keys() == peft.keys() and len(ours) == 4 * (3 if use_dora else 2)
    with torch.no_grad():
        for name, parameter in peft.items():
            parameter.copy_(ours[name].reshape(parameter.shape))
    embedded, seen = model.get_input_embeddings()(tokens()).detach(), []
    for candidate in (model, theirs):
        x = embedded.clone().requires_grad_()
        logits = candidate(inputs_embeds=x).logits
        logits.square().mean().backward()
        seen.append((logits.detach(), x.grad))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-3)
    for name, parameter in ours.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad.reshape(peft[name].shape), peft[name].grad, atol=1e-4, rtol=1e-3)


def test_a_mixture_of_one_expert_with_rslora_equals_peft():
    model = tiny_model()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], use_rslora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(model), config)
    one = {"num_experts": 1, "top_k": 1, "target_keywords": ["up_proj"], "attn_lora": {"enabled": False}}
    plan = lmoe.inject(model, {"lora_r": 4, "lora_alpha": 6, "use_rslora": True, **one})
    randomise(model)
    assert {site.scaling for site in plan.sites} == {6 / math.sqrt(4)}
    with torch.no_grad():
        for layer, wrapped in zip(model.model.layers, theirs.base_model.model.model.layers, strict=True):
            wrapped.mlp.up_proj.lora_A.default.weight.copy_(layer.mlp.up_proj.lora_A[0])
            wrapped.mlp.up_proj.lora_B.default.weight.copy_(layer.mlp.up_proj.lora_B[0])
        ids = tokens()
        torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_dora_starts_as_the_backbone():
    model, ids = tiny_model(), tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        lmoe.inject(model, {"attn_lora": {"use_dora": True}})
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-4)


# --- singular directions


@pytest.mark.parametrize(
    ("router", "mixing"), [*((name, "outputs") for name in ROUTERS), ("top_k", "factors"), ("soft", "factors")]
)
def test_an_svd_start_leaves_the_backbones_logits_and_gives_every_expert_a_gradient(router, mixing):
    model, ids = tiny_model(), tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    domains = {"domains": DOMAINS} if router in BY_DOMAIN else {}
    lmoe.inject(model, {"lora_r": 4, "init_lora": "svd"}, {"router": router, "mixing": mixing, **domains})
    with torch.no_grad(), traced(model, torch.ones_like(ids)):
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=2e-4, rtol=1e-3)
    grads = gradients(model)
    assert len(list(mixtures(model))) == 6
    for path, site in mixtures(model):
        assert site.lora_B.any() and grads[f"{path}.lora_A"].any() and grads[f"{path}.lora_B"].any()


def test_the_svd_start_of_a_site_is_disjoint_slices_of_its_singular_directions():
    """A_e is V_e^T up to a factor: products with other experts' directions vanish; s B_e A_e are terms of W."""
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 4, "init_lora": "svd", "lora_alpha": 6})
    site = model.model.layers[0].mlp.up_proj
    U, S, Vh = torch.linalg.svd(site.base_layer.weight, full_matrices=False)
    for e in range(4):
        first = e * (32 // 4)
        part = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(first, first + 4))
        torch.testing.assert_close(6 / 4 * site.lora_B[e] @ site.lora_A[e], part, atol=1e-4, rtol=1e-3)
        for other in range(4):
            if other != e:
                assert float((site.lora_A[e] @ site.lora_A[other].T).detach().abs().max()) < 1e-4
                assert float((site.lora_B[e].T @ site.lora_B[other]).detach().abs().max()) < 1e-4


@FEW
@given(experts=st.integers(1, 4), rank=st.integers(1, 3), scaling=st.floats(0.2, 4), wide=st.booleans())
def test_svd_slices_are_terms_of_the_weight_and_with_all_of_them_the_weight(experts, rank, scaling, wide):
    torch.manual_seed(experts)
    small = experts * rank
    weight = torch.randn(small, small + 3) if wide else torch.randn(small + 3, small)
    lora_A, lora_B = svd_slices(weight, experts, rank, scaling)
    assert (lora_A.shape, lora_B.shape) == ((experts, rank, weight.shape[1]), (experts, weight.shape[0], rank))
    whole = sum(scaling * lora_B[e] @ lora_A[e] for e in range(experts))
    torch.testing.assert_close(whole, weight, atol=1e-4, rtol=1e-3)


def test_more_directions_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match=r"3 experts of rank 3 need 9 singular directions.*\(8, 20\) has 8"):
        svd_slices(torch.randn(8, 20), 3, 3, 1.0)
    model = tiny_model()
    with pytest.raises(
        InjectionError, match="4 experts of rank 9 need 36 singular directions, and .*gate_proj has 32; lower"
    ):
        lmoe.inject(model, {"init_lora": "svd", "lora_r": 9})
    assert not any(isinstance(module, MixtureLoRALinear) for module in model.modules())
