"""A site with every router, mixing and backend against the loop over tokens and experts; and what follows from it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.errors import RoutingError
from lmoe.layers.context import PromptRows
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.ops.stacked import add_stacked, stacked_delta
from lmoe.rules.routers import ExpertsPerToken, Need
from lmoe.vocabulary import Backend
from tests.layers.loop_routing import (
    CAN_BIAS,
    CAN_GROUP,
    ROUTERS,
    WITH_LOGITS,
    info_for_router,
    known,
    loop_choices,
    scales,
)
from tests.layers.small_site import D, O, Site, router_of, trained
from tests.reference import dumb, dumb_gates, dumb_layer
from tests.reference.no_grouped_kernel import no_grouped_kernel

TOLERANCE = {torch.float32: {"atol": 3e-4, "rtol": 3e-4}, torch.float64: {"atol": 1e-9, "rtol": 1e-9}}


def loop_output(made: Site, site: MixtureLoRALinear, x: Tensor, choices: list[dumb_gates.Choice]) -> Tensor:
    shared = site.shared_expert
    return dumb_layer.mixture(
        x.reshape(-1, D),
        site.base_layer.weight,
        site.base_layer.bias,
        site.lora_A,
        site.lora_B,
        [choice.weights for choice in choices],
        scaling=made.scaling,
        mixing=made.mixing,
        start=(site.lora_A_start, site.lora_B_start) if made.svd else None,
        shared=None if shared is None else dumb_layer.Branch(shared.lora_A, shared.lora_B, 0.8),
    ).view(*x.shape[:-1], O)


def loop_losses(made: Site, z: Tensor | None, choices: list[dumb_gates.Choice], valid: list[bool]) -> Tensor:
    """Balance and z-loss, and relu's L1 weighted by 0.25, each with coefficient 1."""
    importance = made.balance == "importance_cv"
    total = (dumb_layer.importance_cv if importance else dumb_layer.balance_loss)(choices, valid)
    z = torch.zeros(len(choices), made.experts, dtype=made.dtype) if z is None else z
    total = total + dumb.router_z_loss(z, valid)
    return total + (0.25 * dumb_layer.relu_l1(choices, valid, made.top_k) if made.declared.l1 else 0)


@st.composite
def made_sites(draw, router: str) -> Site:
    """Every combination that a config allows."""
    declared = Site(router=router).declared
    experts = draw(st.integers(1, 4))
    grouped = router in CAN_GROUP and draw(st.booleans())
    special = draw(st.sampled_from(["plain", "shared A", "svd"]))
    rank = draw(st.sampled_from([4] if grouped else [1, 2, 3]))
    mixings = ["outputs"] if grouped or declared.experts_per_token is ExpertsPerToken.one else ["outputs", "factors"]
    mixing = draw(st.sampled_from(mixings))
    if special == "svd":
        rank = 2 if grouped else 8 // experts if rank * experts > 8 else rank  # of min(D, O) = 8 directions
    return Site(
        router=router,
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        top_p=draw(st.sampled_from([0.3, 0.6, 0.9])),
        rank=rank,
        scale=draw(st.sampled_from(scales(router))),
        temperature=draw(st.sampled_from([0.7, 1.0, 2.0])) if declared.temperature else 1.0,
        mixing=mixing,
        backend="grouped" if grouped else "stacked",
        shared_lora_A=special == "shared A" and not grouped,
        shared_lora_r=draw(st.sampled_from([None, 2])),
        svd=special == "svd",
        bias=router in CAN_BIAS and draw(st.booleans()),
        balance=draw(st.sampled_from(["aux_loss", "importance_cv"])),
        dtype=torch.float32 if grouped or declared.needs is Need.prompt else draw(st.sampled_from(list(TOLERANCE))),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("router", ROUTERS)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(data=st.data(), lead=st.sampled_from([(3,), (1, 1), (2, 2)]), masked=st.booleans())
def test_outputs_losses_and_all_gradients_equal_the_loop(router, data, lead, masked):
    """Gradients of x, router, A, B and the shared expert, of the output and the auxiliary loss together."""
    made = data.draw(made_sites(router))
    if made.declared.needs is Need.prompt and len(lead) == 1:
        lead = (1, 3)
    site = made.make()
    x = torch.randn(*lead, D, dtype=made.dtype, requires_grad=True)
    valid = torch.ones(lead, dtype=torch.bool)
    if masked and valid.numel() > 1:
        valid.view(-1)[-1] = False
    trace, facts = router_of(site).trace, info_for_router(router_of(site), x, valid, seed=made.seed)
    with router_of(site).context.with_batch_info(**facts), trace.recording(valid):
        y = site(x)
    z, choices = loop_choices(made, router_of(site), x, facts)
    expected = loop_output(made, site, x, choices)
    torch.testing.assert_close(y, expected, **TOLERANCE[made.dtype])
    weights = torch.stack([torch.stack(choice.weights) for choice in choices]).view(*lead, made.experts)
    torch.testing.assert_close(trace.routing["site"].routing_weights, weights, **TOLERANCE[made.dtype])
    flags = valid.flatten().tolist()
    if made.balance == "importance_cv":
        assume(any(flag and choice.chosen for flag, choice in zip(flags, choices, strict=True)))  # relu: or 0 / 0
    ours, theirs = trace.auxiliary_loss(), loop_losses(made, z, choices, flags)
    torch.testing.assert_close(ours, theirs, check_dtype=False, **TOLERANCE[made.dtype])
    along, leaves = torch.randn_like(y), [x, *trained(site).values()]
    grads = torch.autograd.grad((y * along).sum() + ours, leaves, allow_unused=True, materialize_grads=True)
    loops = torch.autograd.grad((expected * along).sum() + theirs, leaves, allow_unused=True, materialize_grads=True)
    for name, ours_grad, loop in zip(["x", *trained(site)], grads, loops, strict=True):
        torch.testing.assert_close(
            ours_grad, loop, **TOLERANCE[made.dtype], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_learnt_noise_in_training_equals_the_loop():
    made = Site(router="noisy_top_k", scale="raw")
    router, x = made.make_router().train(), torch.randn(4, D)
    torch.manual_seed(7)
    routing = router(x)
    torch.manual_seed(7)
    noise, z = torch.randn(4, 3), dumb_layer.logits(x, router.weight)
    size = dumb_layer.logits(x, router.noise_weight)
    noisy = [dumb_gates.noisy(*token) for token in zip(z, size, noise, strict=True)]
    rows = [dumb_gates.top_k(row, k=2, temperature=1.0, scale="raw") for row in noisy]
    expected = torch.stack([torch.stack(row.weights) for row in rows])
    torch.testing.assert_close(routing.routing_weights, expected)
    torch.testing.assert_close(routing.router_logits, z)
    leaves, along = [router.weight, router.noise_weight], torch.randn(4, 3)
    ours, loop = (torch.autograd.grad(w, leaves, along) for w in (routing.routing_weights, expected))
    torch.testing.assert_close(ours, loop)


# --- symmetries


@pytest.mark.parametrize("backend", ["stacked", "grouped"])
@pytest.mark.parametrize("router", WITH_LOGITS)
def test_permuting_the_experts_permutes_the_routing_and_leaves_the_output(router, backend):
    if backend == "grouped" and router not in CAN_GROUP:
        pytest.skip("no fixed number of experts")
    made = Site(router=router, experts=4, backend=backend, bias=router in CAN_BIAS)
    site, twin, order = made.make(), made.make(), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for owner, name in (
            (twin, "lora_A"),
            (twin, "lora_B"),
            (twin.router, "weight"),
            *((twin.router, name) for name in made.declared.extra_weights),
            (twin.router, "selection_bias"),
        ):
            values = getattr(owner, name, None)
            if values is not None:
                values.copy_(values[order].clone())
    x, valid = torch.randn(2, 3, D), torch.ones(2, 3, dtype=torch.bool)
    seen = []
    for one in (site, twin):
        with known(router_of(one), x, valid), router_of(one).trace.recording(valid) as trace:
            seen.append((one(x), trace.routing["site"], trace.auxiliary_loss()))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][2], seen[1][2])
    for name in ("router_logits", "probs", "routing_weights", "assignment"):
        torch.testing.assert_close(getattr(seen[0][1], name)[..., order], getattr(seen[1][1], name))


@pytest.mark.parametrize("balance", ["aux_loss", "importance_cv"])
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_changes_nothing_at_valid_tokens_nor_in_losses(router, balance):
    site = Site(router=router, balance=balance).make()
    x, valid = torch.randn(2, 3, D), torch.ones(2, 3, dtype=torch.bool)
    padded, mask = torch.cat([x, torch.full((2, 2, D), 37.0)], 1), torch.tensor([[True] * 3 + [False] * 2] * 2)
    context = router_of(site).context
    experts = torch.tensor([[0, 1, 2], [2, 1, 0]])
    more = torch.cat([experts, torch.zeros(2, 2, dtype=torch.long)], 1)
    seen = []
    for tokens, keep, ids in ((x, valid, experts), (padded, mask, more)):
        leaf = tokens.clone().requires_grad_()
        with (
            context.with_batch_info(rows=PromptRows.single(keep).with_hashes(ids), expert_of_token=ids),
            router_of(site).trace.recording(keep) as trace,
        ):
            y = site(leaf)
        loss = y[:, :3].square().sum() + trace.auxiliary_loss()
        grads = torch.autograd.grad(loss, [leaf, *trained(site).values()], allow_unused=True, materialize_grads=True)
        seen.append((y[:, :3], trace.auxiliary_loss(), trace.loads()["site"], grads[0][:, :3], grads[1:]))
    torch.testing.assert_close(seen[0], seen[1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["stacked", "grouped"])
@pytest.mark.parametrize("router", [name for name in ROUTERS if "sum_to_one" in scales(name)])
def test_equal_experts_make_routing_irrelevant_where_weights_sum_to_one(router, backend):
    if backend == "grouped" and router not in CAN_GROUP:
        pytest.skip("no fixed number of experts")
    site = Site(router=router, scale="sum_to_one", backend=backend).make()
    with torch.no_grad():
        for factor in (site.lora_A, site.lora_B):
            factor.copy_(factor[:1].clone().expand_as(factor))
    x, valid = torch.randn(2, 3, D), torch.ones(2, 3, dtype=torch.bool)
    with known(router_of(site), x, valid):
        y = site(x)
    torch.testing.assert_close(y, site.base_layer(x) + 1.7 * x @ (site.lora_B[0] @ site.lora_A[0]).T)
    weight = getattr(site.router, "weight", None)
    if isinstance(weight, torch.nn.Parameter):
        (grad,) = torch.autograd.grad(y.sum(), weight)
        assert float(grad.abs().max()) < 1e-4


def test_both_mixings_agree_for_one_expert_of_weight_one_and_differ_for_two():
    x = torch.randn(5, D)
    for experts, equal in ((1, True), (2, False)):
        outputs = Site(experts=experts, top_k=experts, scale="sum_to_one").make()
        factors = Site(experts=experts, top_k=experts, scale="sum_to_one", mixing="factors").make()
        assert torch.allclose(outputs(x), factors(x), atol=1e-5) is equal


# --- shapes of the input


@pytest.mark.parametrize("backend", ["stacked", "grouped"])
@pytest.mark.parametrize("router", ROUTERS)
def test_transposed_expanded_and_empty_inputs_are_taken_as_they_are(router, backend):
    if backend == "grouped" and router not in CAN_GROUP:
        pytest.skip("no fixed number of experts")
    site = Site(router=router, backend=backend).make()
    for x in (torch.randn(3, 2, D).transpose(0, 1), torch.randn(1, 1, D).expand(2, 3, D), torch.randn(0, 3, D)):
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        with known(router_of(site), x, valid):
            torch.testing.assert_close(site(x), site(x.contiguous()))


# --- types


@pytest.mark.parametrize("special", ["plain", "factors", "grouped", "shared", "svd"])
@pytest.mark.parametrize("router", ROUTERS)
def test_bfloat16_autocast_is_close_and_gradients_and_parameters_stay_float32(router, special):
    if special == "grouped" and router not in CAN_GROUP:
        pytest.skip("no fixed number of experts")
    made = {
        "plain": Site(router=router),
        "factors": Site(router=router, mixing="factors"),
        "grouped": Site(router=router, backend="grouped", rank=8),
        "shared": Site(router=router, shared_lora_r=2, shared_lora_A=True),
        "svd": Site(router=router, svd=True, rank=2),
    }[special]
    site, x, valid = made.make(), torch.randn(2, 3, D, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    before = {name: p.dtype for name, p in site.named_parameters()}
    with known(router_of(site), x, valid):
        exact = site(x)
        with torch.autocast("cpu", dtype=torch.bfloat16), router_of(site).trace.recording(valid) as trace:
            rounded = site(x)
            loss = rounded.float().square().mean() + trace.auxiliary_loss()
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert {getattr(trace.routing["site"], n).dtype for n in ("router_logits", "probs", "routing_weights")} == {
        torch.float32
    }
    grads = torch.autograd.grad(loss, [x, *trained(site).values()], allow_unused=True)
    assert {g.dtype for g in grads if g is not None} == {torch.float32}
    assert {name: p.dtype for name, p in site.named_parameters()} == before
    expected = torch.autograd.grad(exact.square().mean(), [site.lora_A, site.lora_B])
    names = ["x", *trained(site)]
    for reference, name in zip(expected, ("lora_A", "lora_B"), strict=True):
        cosine = torch.cosine_similarity(grads[names.index(name)].flatten(), reference.flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.parametrize("backend", ["stacked", "grouped"])
def test_a_bfloat16_base_takes_float32_experts(backend):
    site = Site(backend=backend, rank=8).make()
    site.base_layer.to(torch.bfloat16)
    x = torch.randn(2, 3, D).bfloat16().requires_grad_()
    y = site(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, site.lora_A.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert router_of(site).weight.grad.dtype == torch.float32


def test_router_dtype_bfloat16_rounds_the_routing_and_nothing_else():
    full, half = Site().make(), Site(router_dtype=torch.bfloat16).make()
    x, valid = torch.randn(4, D), torch.ones(4, dtype=torch.bool)
    for site in (full, half):
        with router_of(site).trace.recording(valid):
            site(x)
    z, rounded = (router_of(site).trace.routing["site"].router_logits for site in (full, half))
    assert rounded.dtype == torch.bfloat16 and not torch.equal(z, rounded.float())
    torch.testing.assert_close(z, rounded.float(), atol=0.05, rtol=0.05)
    assert half(x).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_neither_input_nor_parameters_are_edited_in_place(router, training):
    site, x = Site(router=router, dropout=0.3 if training else 0.0).make(), torch.randn(2, 3, D)
    router_of(site).context.expert_dropout, router_of(site).context.router_noise = 0.5, 0.5
    before = x.clone(), {name: values.clone() for name, values in site.state_dict().items()}
    with known(router_of(site), x, torch.ones(2, 3, dtype=torch.bool)):
        site.train(training)(x)
    assert torch.equal(x, before[0])
    assert all(torch.equal(values, before[1][name]) for name, values in site.state_dict().items())


# --- backends


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_grouped_with_a_rank_that_is_not_aligned_says_what_to_do(rank):
    site = Site(backend="grouped", rank=rank).make()
    says = rf"(?=.*lora_r)(?=.*\b{rank}\b)(?=.*multiple of 4).*Use stacked or auto"
    with pytest.raises(RoutingError, match=says):
        site(torch.randn(2, D))


def test_tiles_take_a_rank_that_torchs_kernel_cannot(monkeypatch):
    site, x = Site(backend="grouped", rank=3).make(), torch.randn(5, D)
    no_grouped_kernel(monkeypatch)
    grouped = site(x)
    site.settings = replace(site.settings, backend=Backend.stacked)
    torch.testing.assert_close(grouped, site(x))


def test_grouped_with_one_lora_A_for_all_says_what_to_do():
    with pytest.raises(RoutingError, match="one lora_A for.*Use stacked or auto"):
        Site(backend="grouped", shared_lora_A=True).make()(torch.randn(2, D))


@pytest.mark.parametrize("backend", ["grouped", "auto"])
def test_a_width_that_is_not_aligned_is_computed_or_refused_in_words(backend):
    """torch's grouped matmul needs D and O aligned as well as R."""
    made = replace(Site(backend=backend, rank=256), experts=8, top_k=1)
    site = made.make()
    site.base_layer = torch.nn.Linear(D, 6).requires_grad_(False)
    site.lora_B = torch.nn.Parameter(torch.zeros(8, 256, 6).transpose(1, 2))
    if backend == "auto":
        assert site(torch.randn(3, D)).shape == (3, 6)
    else:
        with pytest.raises(RoutingError, match="Use stacked or auto"):
            site(torch.randn(3, D))


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    experts=st.integers(1, 4),
    rank=st.integers(1, 3),
    lead=st.sampled_from([(3,), (2, 2)]),
    one_A=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradcheck_of_add_stacked_which_equals_stacked_delta(experts, rank, lead, one_A, seed):
    torch.manual_seed(seed)
    y, hidden, gates = (
        torch.randn(*lead, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5,), (1 if one_A else experts, rank), (experts,))
    )
    lora_B = torch.randn(experts, 5, rank, dtype=torch.float64, requires_grad=True)
    leaves = [y, hidden, lora_B, gates]
    assert torch.autograd.gradcheck(lambda y, h, B, g: add_stacked(y.clone(), h, B, g), leaves)
    ours, plain = add_stacked(y.clone(), hidden, lora_B, gates), y + stacked_delta(hidden, lora_B, gates)
    torch.testing.assert_close(ours, plain)
    along = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, along), torch.autograd.grad(plain, leaves, along))
