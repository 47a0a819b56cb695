"""Changing any key of `injection` or `moe` changes plan, output or gradient of a tiny model, or its training."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import lmoe
from lmoe.config.defaults import moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.keys import leaf_keys
from lmoe.config.moe import MoeConfig
from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError, RoutingError
from lmoe.injection.record import injected, routers
from lmoe.training.auxiliary import Auxiliary
from lmoe.training.dials import Dials, set_dials
from lmoe.training.phases import Phase
from lmoe.vocabulary import Role
from tests.tiny_models import tiny_model, tokens


@dataclass(frozen=True)
class Case:
    """One changed key.

    Args:
        value: another value than the default of `observe`.
        changes: what must differ: plan, logits, gradients.
        beside: what the key needs to act, on both sides of the comparison.
    """

    value: Any
    changes: set[str]
    beside: dict[str, Any] = field(default_factory=dict)


OF_MODEL = {"moe.router": "sequence", "moe.router_scope": "model"}
CASES = {
    "injection.lora_r": Case(2, {"plan", "logits", "gradients"}),
    "injection.lora_alpha": Case(3.0, {"logits", "gradients"}),
    "injection.lora_dropout": Case(0.5, {"logits", "gradients"}),
    "injection.num_experts": Case(3, {"plan", "logits", "gradients"}),
    "injection.top_k": Case(1, {"plan", "logits", "gradients"}),
    "injection.use_rslora": Case(True, {"logits", "gradients"}),
    "injection.shared_lora_r": Case(3, {"plan", "gradients"}),
    "injection.shared_lora_A": Case(True, {"plan", "logits", "gradients"}),
    "injection.init_lora": Case("svd", {"gradients"}, {"injection.lora_B_std": None}),
    "injection.target_keywords": Case(["up_proj"], {"plan", "logits", "gradients"}),
    "injection.start_layer": Case(1, {"plan", "logits", "gradients"}),
    "injection.num_layers": Case(1, {"plan", "logits", "gradients"}),
    "injection.stride": Case(2, {"plan", "logits", "gradients"}),
    "injection.layer_indices": Case([1], {"plan", "logits", "gradients"}),
    "injection.share_base": Case(False, {"plan"}, {"injection.strategy": "moe_expert_lora"}),
    "injection.strategy": Case("moe_expert_lora", {"plan", "logits", "gradients"}),
    "injection.num_experts_by_layer": Case([2, 5], {"plan", "logits", "gradients"}),
    "injection.lora_r_by_layer": Case([2, 5], {"plan", "logits", "gradients"}),
    "injection.lora_B_std": Case(0.6, {"logits", "gradients"}),
    "injection.attn_lora.enabled": Case(False, {"plan", "gradients"}),
    "injection.attn_lora.keywords": Case(["k_proj"], {"plan", "gradients"}),
    "injection.attn_lora.lora_r": Case(2, {"plan", "gradients"}),
    "injection.attn_lora.lora_alpha": Case(3.0, {"gradients"}),
    "injection.attn_lora.use_dora": Case(True, {"plan", "gradients"}),
    "moe.router": Case("soft", {"plan", "logits", "gradients"}),
    "moe.router_dtype": Case("bfloat16", {"logits", "gradients"}),
    "moe.router_bias": Case(True, {"plan", "gradients"}),
    "moe.temperature": Case(3.0, {"logits", "gradients"}),
    "moe.router_scope": Case("block", {"plan", "logits", "gradients"}),
    "moe.top_p": Case(0.9, {"logits", "gradients"}, {"moe.router": "top_p"}),
    "moe.scale": Case("unit", {"logits", "gradients"}),
    "moe.mixing": Case("factors", {"logits", "gradients"}),
    "moe.l1_start": Case(0.5, {"gradients"}, {"moe.router": "relu"}),
    "moe.norm_topk_prob": Case(False, {"logits", "gradients"}),
    "moe.router_z_loss_coef": Case(0.7, {"gradients"}),
    "moe.load_balance.type": Case("none", {"gradients"}),
    "moe.load_balance.aux_loss_coef": Case(0.7, {"gradients"}),
    "moe.router_layer": Case(1, {"logits", "gradients"}, OF_MODEL),
    "moe.prompt_experts": Case(True, {"logits", "gradients"}, OF_MODEL),
    "moe.decide": Case("turn", {"logits", "gradients"}, OF_MODEL),
    "moe.router_target": Case("cluster", {"gradients"}),
    "moe.router_target_coef": Case(0.3, {"gradients"}, {"moe.router_target": "cluster"}),
}
# Nothing in one forward and backward of a model outside training; each has a test of its own below.
IN_TRAINING = {
    "moe.temperature_end",
    "moe.router_noise",
    "moe.router_noise_end",
    "moe.anneal_steps",
    "moe.expert_dropout",
    "moe.diversity_coef",
    "moe.l1_growth",
    "moe.load_balance.scope",
    "moe.load_balance.bias_update_rate",
}
ELSEWHERE = {
    "injection.experts_from",  # acts on what training starts from: tests/grow/test_experts_from.py and test_growing.py
    "moe.domains",  # acts on what lmoe.trace is told
    "moe.router_fit_prompts",  # acts once training has ended: tests/training/test_fit_router.py
    "moe.backend",  # acts on how, and not on what
}


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {"injection": {}, "moe": {}}
    for key, value in dotted.items():
        *path, leaf = key.split(".")
        place = sections
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return sections


def observe(changes: dict[str, Any]) -> dict[str, Any]:
    """Plan, logits in training mode, and gradients of loss and auxiliary loss, all seeded."""
    usual = {"injection.lora_r": 4, "injection.lora_B_std": 0.3, "injection.lora_dropout": 0.0}
    model = tiny_model()
    torch.manual_seed(3)
    plan = lmoe.inject(model, **nested(usual | changes))
    model.train()
    torch.manual_seed(4)
    ids = tokens()
    labels = torch.where(torch.tensor([False, True, True, False, False, True, True]), ids, -100)
    targets = [0, 1] if changes.get("moe.router_target") else None
    with lmoe.trace(model, attention_mask=torch.ones_like(ids), targets=targets) as trace:
        out = model(input_ids=ids, labels=labels)
        (out.loss + trace.auxiliary_loss()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"plan": str(plan), "logits": out.logits.detach(), "gradients": gradients}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and a.shape == b.shape else a is b or str(a) == str(b)


@pytest.fixture(scope="module")
def unchanged() -> dict[str, Any]:
    return observe({})


def test_the_table_covers_exactly_the_keys_of_injection_and_moe():
    keys = {f"injection.{key}" for key, _ in leaf_keys(InjectionConfig)}
    keys |= {f"moe.{key}" for key, _ in leaf_keys(MoeConfig)}
    groups = [set(CASES), IN_TRAINING, ELSEWHERE]
    assert set().union(*groups) == keys
    assert sum(len(group) for group in groups) == len(keys) == 55


def test_observing_twice_gives_the_same_bits(unchanged):
    assert same(observe({}), unchanged)


@pytest.mark.parametrize("key", CASES)
def test_every_key_acts(key, unchanged):
    case = CASES[key]
    before = observe(case.beside) if case.beside else unchanged
    changed = observe(case.beside | {key: case.value})
    assert {what for what in before if not same(changed[what], before[what])} >= case.changes


def test_a_strategy_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"injection\.strategy is mixture; allowed"):
        lmoe.inject(tiny_model(), injection={"strategy": "mixture"})


@pytest.mark.parametrize("key", ["moe.router_z_loss_coef", "moe.load_balance.aux_loss_coef"])
def test_a_loss_coefficient_changes_a_router_gradient_and_no_output(key, unchanged):
    changed = observe({key: 0.7})
    assert same(changed["logits"], unchanged["logits"])
    routers = [name for name in unchanged["gradients"] if name.endswith("router.weight")]
    assert len(routers) == 6
    assert all(not same(changed["gradients"][name], unchanged["gradients"][name]) for name in routers)


# --- keys that only training uses


def phase(**changes: bool) -> Phase:
    """One in which everything is on."""
    switches = ("load_balance", "router_z_loss", "router_noise", "expert_dropout", "diversity")
    return Phase(
        name="only",
        start=0,
        end=100,
        trainable=frozenset({Role.router, Role.lora}),
        lr=1e-3,
        warmup=0,
        **{name: changes.get(name, True) for name in switches},
    )


def dials(**moe: Any) -> Dials:
    """Those of a run of 100 optimizer steps."""
    config = RunConfig(moe=moe_section({"router": "top_k", **moe}))
    config.trainer.max_steps = 100
    return Dials.of(config)


def trained_logits(given: Dials, step: int, **switches: bool) -> torch.Tensor:
    """Logits in training mode at an optimizer step, seeded."""
    model = tiny_model()
    torch.manual_seed(3)
    lmoe.inject(model, {"lora_r": 4, "lora_B_std": 0.3})
    set_dials(injected(model), given, phase(**switches), step)
    torch.manual_seed(4)
    return model.train()(input_ids=tokens()).logits.detach()


def test_temperature_end_and_anneal_steps_bend_the_temperature_over_the_steps():
    plain, ended = dials(), dials(temperature_end=3.0)
    early = dials(temperature_end=3.0, anneal_steps="50%")
    middle = 1.0 + 2.0 * 50 / 99  # of 100 steps the last, number 99, has the end value
    assert [ended.at(ended.temperature, step) for step in (0, 50, 99, 120)] == pytest.approx([1.0, middle, 3.0, 3.0])
    assert [early.at(early.temperature, step) for step in (0, 49, 50, 99)] == pytest.approx([1.0, 3.0, 3.0, 3.0])
    assert torch.equal(trained_logits(ended, 0), trained_logits(plain, 0))
    for step in (50, 100):
        assert not torch.equal(trained_logits(ended, step), trained_logits(plain, step))
    assert not torch.equal(trained_logits(early, 50), trained_logits(ended, 50))


def test_router_noise_and_its_end_act_where_the_phase_lets_them():
    quiet, noisy, ending = dials(), dials(router_noise=0.5), dials(router_noise=0.5, router_noise_end=0.0)
    assert not torch.equal(trained_logits(noisy, 0), trained_logits(quiet, 0))
    assert torch.equal(trained_logits(noisy, 0, router_noise=False), trained_logits(quiet, 0))
    assert not torch.equal(trained_logits(ending, 50), trained_logits(noisy, 50))
    assert torch.equal(trained_logits(ending, 100), trained_logits(quiet, 100))


def test_expert_dropout_acts_where_the_phase_lets_it():
    plain, dropping = dials(), dials(expert_dropout=0.9)
    assert not torch.equal(trained_logits(dropping, 0), trained_logits(plain, 0))
    assert torch.equal(trained_logits(dropping, 0, expert_dropout=False), trained_logits(plain, 0))


@pytest.mark.parametrize("router", ["soft", "top_p"])
def test_expert_dropout_acts_on_two_experts_where_top_k_does_not(router):
    """One of them stays, whatever injection.top_k says where nobody has set it."""
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 2, "num_experts": 2}, {"router": router})
    injected(model).context.expert_dropout = 0.99
    ids = tokens()
    torch.manual_seed(0)
    with torch.no_grad(), lmoe.trace(model.train(), attention_mask=torch.ones_like(ids)) as trace:
        model(input_ids=ids)
    used = torch.stack([routing.routing_weights > 0 for routing in trace.routing.values()]).sum(-1)
    assert used.unique().tolist() == [1]


def step_of(model: torch.nn.Module, ids: torch.Tensor, auxiliary: Auxiliary, **switches: bool) -> Any:
    """Auxiliary losses of a micro-batch."""
    record, valid = injected(model), torch.ones_like(ids).bool()
    with record.trace.recording(valid):
        model(input_ids=ids)
        return auxiliary.losses(phase(**switches), valid)


def with_auxiliary(moe: dict[str, Any]) -> tuple[Any, Auxiliary]:
    model = tiny_model()
    torch.manual_seed(3)
    lmoe.inject(model, {"lora_r": 4, "lora_B_std": 0.3}, moe)
    return model, Auxiliary(model, lambda values: values)


def test_diversity_coef_weighs_the_similarity_of_experts_where_the_phase_lets_it():
    totals = {}
    for coef in (0.0, 0.5):
        for on in (True, False):
            model, auxiliary = with_auxiliary({"diversity_coef": coef})
            losses = step_of(model, tokens(), auxiliary, diversity=on)
            totals[coef, on] = float(losses.total.detach())
            extra = losses.values.keys() - {"load_balancing_loss", "router_z_loss"}
            assert len(extra) == bool(coef)
    similarity = float(losses.values[extra.pop()].detach())
    assert totals[0.5, True] == pytest.approx(totals[0.0, True] + 0.5 * similarity)
    assert totals[0.5, False] == totals[0.0, True] == totals[0.0, False]


def test_the_scope_of_the_balance_counts_the_load_of_earlier_micro_batches_too():
    first, second, losses = tokens(), tokens(seed=9), {}
    for scope in ("micro_batch", "global_batch"):
        model, auxiliary = with_auxiliary({"load_balance": {"scope": scope}})
        balances = [step_of(model, ids, auxiliary).values["load_balancing_loss"] for ids in (first, second)]
        losses[scope] = [float(balance.detach()) for balance in balances]
        auxiliary.after_step(phase())
        again = step_of(model, second, auxiliary).values["load_balancing_loss"]
        losses[scope].append(float(again.detach()))
    assert losses["micro_batch"][0] == pytest.approx(losses["global_batch"][0])
    assert losses["micro_batch"][1] != pytest.approx(losses["global_batch"][1])
    assert losses["micro_batch"][2] == pytest.approx(losses["global_batch"][2]), "a new step must start from nothing"


@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_bias_update_rate_is_the_step_of_every_bias(rate):
    model, auxiliary = with_auxiliary(
        {"router": "top_k", "load_balance": {"type": "aux_loss_free", "aux_loss_coef": None, "bias_update_rate": rate}}
    )
    step_of(model, tokens(), auxiliary)
    auxiliary.after_step(phase(load_balance=False))
    assert not any(router.selection_bias.any() for _, router in routers(model))
    step_of(model, tokens(), auxiliary)
    auxiliary.after_step(phase())
    for _, router in routers(model):
        moved = router.selection_bias.abs()
        assert moved.any() and set(moved.tolist()) <= {0.0, torch.tensor(rate).item()}


@pytest.mark.parametrize("growth", [1.1, 1.5])
def test_l1_growth_is_the_factor_of_every_coefficient(growth):
    model, auxiliary = with_auxiliary({"router": "relu", "l1_growth": growth, "l1_start": 0.25})
    for _, router in routers(model):
        torch.nn.init.zeros_(router.weight)  # no expert is active, so the L1 has to shrink
    step_of(model, tokens(), auxiliary)
    auxiliary.after_step(phase())
    for _, router in routers(model):
        assert float(router.l1_coef) == pytest.approx(0.25 / growth)


# --- keys that act elsewhere


def test_the_order_of_domains_says_which_expert_is_whose():
    logits, ids = [], tokens()
    for domains in (["maths", "prose"], ["prose", "maths"]):
        model = tiny_model()
        torch.manual_seed(3)
        lmoe.inject(model, {"lora_r": 4, "lora_B_std": 0.3}, {"router": "oracle", "domains": domains})
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=["maths", "maths"]):
            logits.append(model(input_ids=ids).logits)
    assert not torch.allclose(*logits)


def test_the_backend_chooses_how_and_not_what():
    """grouped gives the same numbers, and refuses a rank that stacked can compute."""
    same_numbers = [observe({"moe.backend": backend})["logits"] for backend in ("stacked", "grouped")]
    torch.testing.assert_close(*same_numbers, atol=1e-4, rtol=1e-4)
    observe({"moe.backend": "stacked", "injection.lora_r": 3})
    with pytest.raises(RoutingError, match="moe.backend=grouped"):
        observe({"moe.backend": "grouped", "injection.lora_r": 3})
