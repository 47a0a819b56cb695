"""LoRA on the experts that a backbone brings along: against the loop, against PEFT, and in little memory."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lmoe
from lmoe.injection.record import mixtures
from lmoe.injection.tracing import adapters_off
from lmoe.layers.native_experts import DOWN, fused_sizes, fused_up, is_expert_parallel, whole_units
from tests.layers.small_native import FUSED, KINDS, E, experts, make, routed, whole_experts
from tests.reference import dumb_experts
from tests.reference.large_tensors import NothingLarger
from tests.tiny_models import randomise, tiny_model, tokens

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
UNUSED = 3
NATIVE = {"strategy": "native_moe_expert_lora", "attn_lora": {"enabled": False}}


def trained(site) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in site.named_parameters() if parameter.requires_grad}


def loop(site, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Token by token, with the full weights of each expert."""
    chosen, of_experts = indices.tolist(), []
    for n, experts_of_token in enumerate(chosen):
        by_expert = [x.new_zeros(()) for _ in range(E)]
        for k, e in enumerate(experts_of_token):
            by_expert[e] = weights[n, k]
        of_experts.append(by_expert)
    return dumb_experts.mixture(x, whole_experts(site), chosen, of_experts)


# --- against the loop


@pytest.mark.parametrize("adapted", [FUSED, ("gate_up_proj",), ("down_proj",), ()], ids=lambda names: " ".join(names))
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_all_gradients_equal_the_loop_over_whole_experts(kind, adapted):
    site = make(experts(kind), adapted=adapted)
    x, indices, weights = routed()
    x.requires_grad_()
    weights.requires_grad_()
    ours, expected = site(x, indices, weights), loop(site, x, indices, weights)
    torch.testing.assert_close(ours, expected, **CLOSE)
    leaves = {"x": x, "weights": weights, **trained(site)}
    assert len(leaves) == 2 + 2 * len(adapted)
    along = torch.randn_like(ours)
    grads, loops = (torch.autograd.grad((y * along).sum(), list(leaves.values())) for y in (ours, expected))
    for name, mine, theirs in zip(leaves, grads, loops, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        if "lora" in name:
            assert [bool(mine[e].any()) for e in range(E)] == [e != UNUSED for e in range(E)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_fused_weights_and_biases_equal_the_loop(kind):
    """Where a phase trains base_ffn."""
    site = make(experts(kind).requires_grad_())
    x, indices, weights = routed()
    leaves = dict(site.base_layer.named_parameters())
    assert len(leaves) == (4 if kind == "gpt_oss" else 2)
    ours, expected = site(x, indices, weights), loop(site, x, indices, weights)
    grads, loops = (torch.autograd.grad(y.sum(), list(leaves.values())) for y in (ours, expected))
    for name, mine, theirs in zip(leaves, grads, loops, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_zero_lora_B_gives_the_native_experts_and_switched_off_it_is_them_bitwise(kind):
    site, given = make(experts(kind)), routed()
    native = site.base_layer(*given)
    assert not torch.allclose(site(*given), native, atol=1e-2)
    site.enabled = False
    assert torch.equal(site(*given), native)
    site.enabled = True
    with torch.no_grad():
        for name in FUSED:
            site.get_submodule(name).lora_B.zero_()
    torch.testing.assert_close(site(*given), native, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_native_experts_with_merged_weights(kind):
    site, given = make(experts(kind)), routed()
    merged = copy.deepcopy(site.base_layer)
    with torch.no_grad():
        for name in FUSED:
            branch = site.get_submodule(name)
            for e in range(E):
                delta = 1.7 * branch.lora_B[e] @ branch.lora_A[e]
                merged.get_parameter(name)[e] += delta.t() if kind == "gpt_oss" else delta
    torch.testing.assert_close(site(*given), merged(*given), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_both_branches_and_in_training_only(kind):
    for name in FUSED:
        site, given = make(experts(kind), adapted=(name,), dropout=0.5), routed()
        assert torch.equal(site(*given), site(*given))
        assert not torch.equal(site.train()(*given), site.eval()(*given)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_backbone_takes_float32_branches_and_autocast_is_close(kind):
    site, (x, indices, weights) = make(experts(kind)), routed()
    exact = site(x, indices, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = site(x, indices, weights)
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    site.base_layer.bfloat16()
    y = site(x.bfloat16(), indices, weights.bfloat16())
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.03 * exact.norm()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained(site).values())


@pytest.mark.parametrize("kind", KINDS)
def test_neither_input_nor_weights_are_edited_in_place_and_no_tokens_are_taken(kind):
    site, given = make(experts(kind)), routed()
    before = [tensor.clone() for tensor in given], {name: v.clone() for name, v in site.state_dict().items()}
    site(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before[0], strict=True))
    assert all(torch.equal(values, before[1][name]) for name, values in site.state_dict().items())
    assert site(*(tensor[:0] for tensor in given)).shape == (0, 8)


# --- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_the_size_of_a_fused_weight_is_made_forward_or_backward(kind, dtype):
    sizes = {"num_experts": 32, "hidden": 32}
    base = experts(kind, inner=32, **sizes).to(dtype)
    site = make(base, rank=2)
    x, indices, weights = routed(6, **sizes)
    x, weights = x.to(dtype).requires_grad_(), weights.to(dtype)
    limit = min(base.get_parameter(name).numel() for name in FUSED)
    with NothingLarger(limit, list(base.parameters())) as seen:
        site(x, indices, weights).float().square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in trained(site).values())
    assert 0 < seen.largest <= limit / 4


def test_the_watch_over_memory_sees_a_materialised_weight():
    base = experts("qwen3_moe")
    site, limit = make(base), base.get_parameter(DOWN).numel()
    branch = site.get_submodule(DOWN)
    with pytest.raises(AssertionError, match="makes a tensor of"), NothingLarger(limit, list(base.parameters())):
        torch.baddbmm(base.get_parameter(DOWN), branch.lora_B, branch.lora_A)


# --- PEFT's target_parameters


def peft_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """(E, R, D) and (E, O, R) in PEFT's layout: A (R E, D) expert by expert, B (O, R E) rank by rank."""
    num_experts, rank, _ = lora_A.shape
    A = torch.zeros(rank * num_experts, lora_A.shape[2])
    B = torch.zeros(lora_B.shape[1], rank * num_experts)
    for e in range(num_experts):
        A[e * rank : (e + 1) * rank] = lora_A[e]
        B[:, e::num_experts] = lora_B[e]
    return A, B


@pytest.mark.parametrize("keywords", [None, ["down_proj"]], ids=["both", "down_proj alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_those_of_peft(kind, keywords):
    model = tiny_model(kind)
    names = keywords or list(FUSED)
    theirs = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in names]),
    ).train()
    lmoe.inject(model, {**NATIVE, "lora_r": 3, "lora_alpha": 6, "target_keywords": keywords})
    randomise(model, std=0.2)
    with torch.no_grad():  # the routers as PEFT's model has them
        for path, module in model.named_modules():
            if path.endswith(("mlp.gate", "mlp.router")):
                module.router.load_state_dict(module.base_layer.state_dict())
    factors = {path: peft_factors(*module.factors()) for path, module in mixtures(model.train())}
    assert len(factors) == 2 * len(names)
    wrappers = peft_wrappers(theirs)
    assert wrappers.keys() == factors.keys()
    with torch.no_grad():
        for path, (A, B) in factors.items():
            wrappers[path].lora_A["default"].weight.copy_(A)
            wrappers[path].lora_B["default"].weight.copy_(B)
    embedded = model.get_input_embeddings()(tokens()).detach()
    seen = []
    for candidate in (model, theirs):
        x = embedded.clone().requires_grad_()
        logits = candidate(inputs_embeds=x).logits
        logits.square().mean().backward()
        seen.append((logits.detach(), x.grad))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-3)
    for path, module in mixtures(model):
        ours = peft_factors(module.lora_A.grad, module.lora_B.grad)
        for mine, layer in zip(ours, (wrappers[path].lora_A, wrappers[path].lora_B), strict=True):
            gradient = layer["default"].weight.grad
            assert gradient.any()
            torch.testing.assert_close(mine, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def peft_wrappers(model) -> dict[str, torch.nn.Module]:
    """PEFT's wrappers of single parameters, by the parameter's path in the backbone."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            inside = re.sub(r"(\.base_layer)+$", "", path.removeprefix("base_model.model."))
            found[f"{inside}.{module.parameter_name}"] = module
    return found


# --- the implementations of Transformers


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_moe"])
def test_the_logits_do_not_depend_on_the_experts_implementation_that_the_config_names(kind):
    model, ids = tiny_model(kind), tokens()
    lmoe.inject(model, {**NATIVE, "lora_r": 4})
    randomise(model, std=0.2)
    adapted, plain = [], []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.config.get_text_config()._experts_implementation = implementation
        with torch.no_grad():
            adapted.append(model(ids).logits)
            with adapters_off(model):
                plain.append(model(ids).logits)
    for others, first in ((adapted[1:], adapted[0]), (plain[1:], plain[0])):
        for logits in others:
            torch.testing.assert_close(logits, first, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(logits, adapted[0]) for logits in adapted[1:])
    assert not torch.allclose(adapted[0], plain[0], atol=1e-2)


# --- what is known of an experts module


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_input_and_the_output_whichever_way_the_weights_lie(kind):
    base = experts(kind)
    assert fused_up(base) == "gate_up_proj"
    assert fused_sizes(base) == {"gate_up_proj": (8, 32), "down_proj": (16, 8)}
    assert not is_expert_parallel(base)
    base._is_expert_parallel = True
    assert is_expert_parallel(base)


@pytest.mark.parametrize(
    ("inner", "dtype", "whole"),
    [(6, torch.float32, False), (8, torch.float32, True), (12, torch.bfloat16, False), (16, torch.bfloat16, True)],
)
def test_rows_of_whole_units_of_memory_are_told_from_others(inner, dtype, whole):
    assert whole_units(experts("qwen3_moe", inner=inner).to(dtype)) is whole
