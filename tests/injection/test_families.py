"""Every family with every strategy: nothing changes at the start, everything trains, and saving, caching and
checkpointing agree. What does not go together is refused with the reason."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.adapter.folder import load_adapter, read_adapter_config, save_adapter
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.errors import InjectionError
from lmoe.injection.record import injected
from lmoe.injection.roles import adapter_parameters, parameter_roles
from lmoe.injection.tracing import adapters_off
from lmoe.vocabulary import InjectionStrategy, Role
from tests.injection.pairs import PAIRS, WORKING, why_refused
from tests.tiny_models import NATIVE_FAMILIES, randomise, tiny_model, tokens

GATED, FUSED, NATIVE = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"experts"}
EXPECTED_FFN = {"phi": {"fc1", "fc2"}, "phi3": FUSED, "glm4": FUSED, "gpt2": {"c_fc", "c_proj"}}
EXPECTED_ATTENTION = {"phi3": {"qkv_proj"}, "gpt2": {"c_attn"}, "deepseek_v3": {"q_b_proj", "kv_b_proj"}}
PARTLY_COVERED = ("qwen3_5_text", "qwen3_5_moe_text")


class Injected:
    """A backbone's own logits, and the same model injected with random adapters and routers."""

    def __init__(self, family: str, strategy: InjectionStrategy) -> None:
        self.family, self.strategy, self.ids = family, strategy, tokens()
        base = tiny_model(family)
        self.model = copy.deepcopy(base)
        given = {"strategy": strategy.value, "lora_r": 4, "lora_dropout": 0.0}
        self.planned = lmoe.plan(self.model, injection=given)
        self.plan = lmoe.inject(self.model, injection=given, trained_base=["base_ffn", "head"])
        with torch.no_grad():
            self.base_logits = base(self.ids).logits
            self.fresh_logits = self.model(self.ids).logits
        randomise(self.model, std=0.1)


@pytest.fixture(scope="module", params=WORKING, ids=["-".join(pair) for pair in WORKING])
def pair(request: pytest.FixtureRequest) -> Injected:
    return Injected(*request.param)


def gradients(model: PreTrainedModel, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss with the auxiliary loss, and the gradients of all that requires one."""
    model.zero_grad()
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss + 10 * trace.auxiliary_loss()
        assert trace.routing.keys() == injected(model).plan.routers.keys()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def only(model: PreTrainedModel, *roles: Role) -> set[str]:
    """Let some roles train; their parameters."""
    owners = parameter_roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(owners[name] in roles)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_table_has_every_family_and_strategy():
    assert len(PAIRS) == 26 * 4 and len(WORKING) == 26 * 4 - 18 - 8


@pytest.mark.parametrize(("family", "strategy"), [pair for pair in PAIRS if pair not in WORKING])
def test_what_does_not_go_together_is_refused_and_names_the_right_strategy(family, strategy):
    model = tiny_model(family)
    before = dict(model.named_modules())
    with pytest.raises(InjectionError, match=why_refused(family, strategy)):
        lmoe.inject(model, injection={"strategy": strategy.value})
    assert dict(model.named_modules()) == before


def test_the_parts_of_the_family_are_found(pair):
    experts = {site.path.rsplit(".", 1)[-1] for site in pair.plan.sites if site.num_experts}
    singles = {site.path.rsplit(".", 1)[-1] for site in pair.plan.sites if site.role is Role.attn_lora}
    ffn = {site.path.rsplit(".", 1)[-1] for site in pair.plan.sites if site.role is Role.lora and not site.num_experts}
    linears, native = EXPECTED_FFN.get(pair.family, GATED), pair.family in NATIVE_FAMILIES
    shared = GATED if pair.family in ("qwen2_moe", "qwen3_5_moe_text", "deepseek_v3") else set()
    dense_layers = {"deepseek_v3": GATED, "gemma4_moe": GATED}.get(pair.family, set()) if native else linears
    expected = {
        InjectionStrategy.dense_lora: (set(), dense_layers | shared),
        InjectionStrategy.mixture_lora: (
            dense_layers | ({"mlp"} if native and pair.family != "gemma4_moe" else set()),
            set(),
        ),
        InjectionStrategy.moe_expert_lora: ({"mlp"}, set()),
        InjectionStrategy.native_moe_expert_lora: (NATIVE, set()),
    }
    assert pair.strategy in expected, f"say here which experts and which single LoRA {pair.strategy} makes"
    assert (experts, ffn) == expected[pair.strategy]
    assert singles == EXPECTED_ATTENTION.get(pair.family, {"q_proj", "v_proj"})


def test_the_plan_says_beforehand_what_injection_does(pair):
    assert pair.planned == pair.plan
    roles = parameter_roles(pair.model)
    adapters = [
        p for name, p in pair.model.named_parameters() if roles[name] in (Role.lora, Role.attn_lora, Role.router)
    ]
    assert sum(p.numel() for p in adapters) == pair.plan.total_parameters
    partly = [warning for warning in pair.plan.warnings if "layers (25%)" in warning]
    assert bool(partly) == (pair.family in PARTLY_COVERED)


def test_the_backbones_logits_are_unchanged_at_the_start(pair):
    torch.testing.assert_close(pair.fresh_logits, pair.base_logits, atol=1e-5, rtol=1e-5)
    if pair.strategy in (InjectionStrategy.dense_lora, InjectionStrategy.mixture_lora):
        assert torch.equal(pair.fresh_logits, pair.base_logits)


def test_adapters_off_gives_the_backbones_logits_bitwise(pair):
    with torch.no_grad():
        assert not torch.allclose(pair.model(pair.ids).logits, pair.base_logits, atol=1e-3)
        with adapters_off(pair.model):
            assert torch.equal(pair.model(pair.ids).logits, pair.base_logits)


def test_every_planned_parameter_gets_a_gradient_and_the_backbone_none(pair):
    planned = only(pair.model, Role.lora, Role.attn_lora, Role.router)
    _, found = gradients(pair.model.train(), pair.ids)
    pair.model.eval()
    assert found.keys() == planned
    assert all(gradient.any() for gradient in found.values())


def test_only_the_role_asked_for_trains(pair):
    """One role after the other; some have no parameters here."""
    for role in (Role.lora, Role.attn_lora, Role.router, Role.base_ffn, Role.head):
        asked = only(pair.model, role)
        if not asked:
            without_routers = role is Role.router and not pair.plan.routers
            assert role is Role.head or without_routers or pair.family in NATIVE_FAMILIES, role
            continue
        _, found = gradients(pair.model.train(), pair.ids)
        assert found.keys() == asked, role
    pair.model.eval().zero_grad()


def test_gradient_checkpointing_gives_the_same_loss_and_gradients_routers_included(pair):
    only(pair.model, Role.lora, Role.attn_lora, Role.router)
    twin = copy.deepcopy(pair.model).train()
    loss, plain = gradients(twin, pair.ids)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    recompute_activations(twin)
    checkpointed_loss, checkpointed = gradients(twin, pair.ids)
    assert checkpointed_loss == pytest.approx(loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_saved_and_loaded_adapters_give_the_same_logits_bitwise(pair, tmp_path: Path):
    """With what a phase has trained of the backbone itself."""
    twin = copy.deepcopy(pair.model)
    with torch.no_grad():
        for name, role in parameter_roles(twin).items():
            if role is Role.base_ffn:
                twin.get_parameter(name).mul_(1.1)
    save_adapter(twin, tmp_path, {"name": pair.family, "revision": None, "precision": "float32"})
    config = read_adapter_config(tmp_path)
    fresh = tiny_model(pair.family)
    lmoe.inject(fresh, config.injection, config.moe, trained_base=config.trained_base)
    load_adapter(fresh, tmp_path, config)
    assert adapter_parameters(fresh).keys() == adapter_parameters(twin).keys()
    with torch.no_grad():
        assert torch.equal(fresh(pair.ids).logits, twin(pair.ids).logits)


def test_generating_with_a_cache_gives_the_tokens_of_generating_without(pair):
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    cached = pair.model.generate(pair.ids[:1, :5], use_cache=True, **settings)
    assert torch.equal(cached, pair.model.generate(pair.ids[:1, :5], use_cache=False, **settings))
    assert cached.shape[1] > 5
