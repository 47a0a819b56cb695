"""What routers are taught of a row, and experts that train on it: moe.router_target, phase.….route_by=target."""

from dataclasses import replace

import pytest
import torch

import lmoe
from lmoe.errors import ConfigError, RoutingError
from lmoe.injection.record import injected, mixtures, routers
from lmoe.layers.expert_ffn import ExpertFFN
from lmoe.ops.router_targets import experts_of_targets
from lmoe.rules.routers import ROUTERS
from lmoe.vocabulary import Backend, LoadBalanceType, RouterKind
from tests.injection.tiny_injected import DOMAINS, randomly, tiny_injected
from tests.layers.loop_routing import scales
from tests.reference import dumb_targets
from tests.tiny_models import tiny_model, tokens

TAUGHT = [k.value for k, router in ROUTERS.items() if router.logits and router.trains]
BY_TARGET = [kind for kind in TAUGHT if not ROUTERS[kind].l1]
TARGET = {"router_target": "domain", "domains": [*DOMAINS, "law"]}
SCOPES = [*((kind, "linear") for kind in BY_TARGET), ("top_k", "block"), ("sequence", "block"), ("sequence", "model")]


def small(router: str = "top_k", **settings):
    """With logits small enough for every expert to have a probability above 0."""
    return tiny_injected(router, std=0.05, **settings)


def labels_of(ids: torch.Tensor, prompt: int = 2) -> torch.Tensor:
    """Labels of all but the first tokens."""
    return torch.where(torch.arange(ids.shape[1]) < prompt, -100, ids)


def step(model, rows: list[int], *, by_target: bool = True):
    """Trace and gradients of a step on two rows with these targets, all that is random drawn alike."""
    injected(model).context.by_target = by_target
    ids = tokens()
    torch.manual_seed(5)
    with lmoe.trace(model, attention_mask=torch.ones_like(ids), targets=rows) as trace:
        (model(input_ids=ids, labels=labels_of(ids)).loss + trace.auxiliary_loss()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return trace, gradients


def check_only_the_experts_of(rows: list[int], model, experts: int) -> None:
    trace, gradients = step(model, rows)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}  # or DDP would wait
    allowed = experts_of_targets(torch.tensor(rows), 3, experts)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for routing in trace.routing.values():
        shown = routing.routing_weights.reshape(2, -1, experts)
        assert not shown[~allowed.unsqueeze(1).expand_as(shown)].any()
        assert (shown.sum(-1) > 0).all()
        torch.testing.assert_close(routing.assignment.sum(-1), torch.ones(routing.assignment.shape[:-1]))
    used = allowed.any(0)
    for path, _ in mixtures(model):
        for name in ("lora_A", "lora_B"):
            gradient = gradients[f"{path}.{name}"].flatten(1)
            learning = gradient.any(1)
            assert learning.any() and not learning[~used].any()
            assert learning[used].all() or injected(model).moe.router is RouterKind.top_p
    assert len(list(mixtures(model))) >= 6


@pytest.mark.parametrize(("router", "scope"), SCOPES)
def test_only_the_experts_of_the_target_act_and_learn_with_every_scale_and_backend(router, scope):
    """5 experts, of which target 1 of 3 has numbers 1 and 4, and 2 has number 2."""
    backends = (Backend.stacked, Backend.grouped) if ROUTERS[router].fixed_k else (Backend.stacked,)
    for scale in scales(router):
        for backend in backends:
            moe = {"scale": scale, "backend": backend.value, "router_scope": scope, "expert_dropout": 0.5, **TARGET}
            model = randomly(small(router, injection={"num_experts": 5}, moe=moe))
            check_only_the_experts_of([1, 2], model, 5)


@pytest.mark.parametrize(("router", "scope"), [("top_k", "linear"), ("soft", "linear"), ("sequence", "model")])
def test_so_do_experts_that_are_whole_blocks(router, scope):
    injection = {"strategy": "moe_expert_lora", "num_experts": 5}
    model = small(router, injection=injection, moe={"router_scope": scope, **TARGET}).train()
    assert any(isinstance(module, ExpertFFN) for module in model.modules())
    check_only_the_experts_of([1, 2], model, 5)


@pytest.mark.parametrize("balance", LoadBalanceType)
def test_every_balance_stays_finite(balance):
    coefs = {"aux_loss": {"aux_loss_coef": 0.1}, "importance_cv": {"aux_loss_coef": 0.1}}
    load = {"type": balance.value, "aux_loss_coef": None, **coefs.get(balance.value, {})}
    load |= {"bias_update_rate": 0.5} if balance is LoadBalanceType.aux_loss_free else {}
    model = small("top_k", injection={"num_experts": 5}, moe={"load_balance": load, **TARGET}).train()
    for _ in range(2):
        check_only_the_experts_of([0, 2], model, 5)
        lmoe.balance(model)


def test_experts_are_dealt_alike_at_sites_with_different_numbers_of_them():
    injection = {"num_experts": 4, "num_experts_by_layer": [3, 5]}
    model = small("soft", injection=injection, moe=TARGET).train()
    trace, _ = step(model, [0, 1])
    for name, routing in trace.routing.items():
        experts = 3 if ".layers.0." in name else 5
        for row, weights in enumerate(routing.routing_weights[:, 0]):
            assert weights.nonzero().flatten().tolist() == dumb_targets.experts_of(row, experts, 3)


@pytest.mark.parametrize(("router", "scope"), SCOPES)
def test_evaluation_and_rows_without_target_go_by_the_router(router, scope):
    model = small(router, injection={"num_experts": 5}, moe={"router_scope": scope, **TARGET})
    ids, logits = tokens(), []
    for by_target, targets in ((False, None), (True, [1, 2])):
        injected(model).context.by_target = by_target
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids), targets=targets):
            logits.append(model(input_ids=ids, labels=labels_of(ids)).logits)
    assert torch.equal(*logits)
    trained = [step(model.train(), [-1, -1], by_target=by_target)[1] for by_target in (True, False)]
    torch.testing.assert_close(trained[0], trained[1], atol=1e-7, rtol=1e-5)  # gradients add up in another order


@pytest.mark.parametrize(("router", "scope"), [*SCOPES, ("relu", "linear")])
def test_the_loss_is_that_of_the_loop_over_the_clean_logits_and_reaches_every_router(router, scope):
    moe = {"router_scope": scope, "router_target_coef": 0.0, **TARGET}
    model = randomly(small(router, injection={"num_experts": 5}, moe=moe))
    ids, mask = tokens(), torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    with lmoe.trace(model, attention_mask=mask, domains=["law", "prose"]) as trace:
        model(input_ids=ids, attention_mask=mask, labels=labels_of(ids).masked_fill(mask == 0, -100))
        loss = trace.router_target_loss()
    targets, valid = [2] * 7 + [1] * 7, mask.flatten().bool().tolist()
    loops = [dumb_targets.loss(r.router_logits.reshape(14, 5), targets, valid, 3) for r in trace.routing.values()]
    torch.testing.assert_close(loss, sum(loops) / len(loops))
    named = {name: router.weight for name, router in routers(model)}
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    assert all(gradient.any() for gradient in gradients)
    on = replace(trace.losses.weights, router_z=0.1)
    totals = [trace.forward_losses(replace(on, router_target=coef)).total for coef in (0.7, 0.0)]
    weighed = totals[0] - totals[1]
    torch.testing.assert_close(weighed, 0.7 * loss)


def test_its_weight_is_the_coefficient_and_without_targets_it_is_left_out():
    ids, losses = tokens(), []
    for coef in (0.0, 0.5):
        model = small("top_k", moe={"router_target_coef": coef, **TARGET}).train()
        for targets in (None, [0, 1]):
            with lmoe.trace(model, attention_mask=torch.ones_like(ids), targets=targets) as trace:
                model(input_ids=ids)
                losses.append(trace.auxiliary_loss().detach())
        taught = trace.router_target_loss().detach()
    assert losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(losses[3], losses[0] + 0.5 * taught)


def test_names_and_numbers_of_rows_and_of_tokens_say_the_same():
    model, ids = small("top_k", moe=TARGET), tokens()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    ways = [
        {"domains": ["law", "maths"]},
        {"targets": [2, 0]},
        {"targets": torch.tensor([2, 0])},
        {"targets": torch.tensor([[2] * 7, [0] * 7])},
    ]
    found = []
    for way in ways:
        with lmoe.trace(model, attention_mask=mask, **way) as trace:
            model(input_ids=ids)
            assert trace.targets is not None
            assert trace.targets.count == 3 and trace.targets.ids.tolist() == [[2] * 5 + [-1] * 2, [0] * 7]
            found.append(float(trace.router_target_loss().detach()))
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("moe", "given", "said"),
    [
        (TARGET, {"domains": ["law", "art"]}, r"no target for the domain 'art'; it has \['maths', 'prose', 'law'\]"),
        (TARGET, {"domains": ["law"]}, "1 domains for 2 rows"),
        (TARGET, {"domains": "law"}, "`domains='law'` must be a list with one name for each row"),
        (TARGET, {"domains": ["law", "law"], "targets": [0, 1]}, "both say what the routers are taught"),
        (TARGET, {"targets": [0, 3]}, "from 0 to 3; this model has targets 0 to 2"),
        (TARGET, {"targets": [0, -2]}, "from -2 to 0"),
        (TARGET, {"targets": [0, 1, 2]}, r"targets are \(3,\); give one number for each of 2 rows"),
        ({}, {"targets": [0, 1]}, "for moe.router_target=domain or cluster; this model has none"),
        ({"router_target": "cluster"}, {"domains": ["law", "law"]}, "domains are for moe.router=oracle"),
    ],
)
def test_what_cannot_be_a_target_says_so(moe, given, said):
    model, ids = small("top_k", moe=moe), tokens()
    with pytest.raises(RoutingError, match=said), lmoe.trace(model, attention_mask=torch.ones_like(ids), **given):
        pass


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"router_target": "auto"}, "router_target=auto is for the config of a run.*use domain.*or cluster"),
        ({"router_target": "domain"}, "two names at least in moe.domains, which is None"),
        ({"router_target": "domain", "domains": ["a"]}, r"two names at least in moe.domains, which is \['a'\]"),
        ({"router_target": "domain", "domains": list("abcde")}, "has 5 names, and a site has 4 experts"),
    ],
)
def test_injecting_without_known_targets_is_refused(moe, said):
    model = tiny_model()
    with pytest.raises(ConfigError, match=said):
        lmoe.inject(model, {}, moe)
    assert not hasattr(model, "lmoe_injected")


def test_clusters_are_as_many_as_the_fewest_experts_where_nobody_names_them():
    model = tiny_model()
    lmoe.inject(model, {"num_experts_by_layer": [3, 5]}, {"router_target": "cluster"})
    assert injected(model).moe.domains == ["cluster0", "cluster1", "cluster2"]
