"""Every gate against its loop: outputs, gradients, scales, shares and refusals."""

from dataclasses import asdict, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.layers.routers import LinearRouter
from lmoe.ops.gating import (
    Gate,
    noisy_logits,
    oracle_gate,
    relu_gate,
    sigmoid_gate,
    soft_gate,
    top_k_gate,
    top_p_gate,
    uniform_gate,
)
from lmoe.rules.routers import ROUTERS, ExpertsPerToken
from lmoe.vocabulary import MixtureScale, RouterKind
from tests.layers.loop_routing import GATES
from tests.layers.small_site import Site
from tests.reference import dumb_gates

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.float64: {"atol": 1e-11, "rtol": 1e-11}}


@dataclass(frozen=True)
class Drawn:
    """What a gate may be given."""

    k: int
    p: float
    temperature: float
    scale: str
    bias: Tensor | None


def scales(name: str) -> list[str]:
    """What a gate can weigh by: where raw is one of them, the router's gate uses `weigh`, which knows all three."""
    declared = ROUTERS[RouterKind(name)].scales
    return [scale.value for scale in (MixtureScale if MixtureScale.raw in declared else declared)]


def gated(name: str, z: Tensor, drawn: Drawn) -> Gate:
    """What the gate of a router makes of logits (..., E)."""
    made = Site(
        router=name,
        experts=z.shape[-1],
        top_k=drawn.k,
        top_p=drawn.p,
        temperature=drawn.temperature,
        scale=drawn.scale,
        bias=drawn.bias is not None,
    )
    with torch.random.fork_rng(devices=[]):
        router = made.make_router()
    assert isinstance(router, LinearRouter)
    router.selection_bias = drawn.bias
    return router.gate(z)


EVERY_GATE_AND_SCALE = [(name, scale) for name in GATES for scale in scales(name)]
MAY_CHOOSE_NONE = [k.value for k, router in ROUTERS.items() if router.experts_per_token is ExpertsPerToken.about_top_k]


def stacked(rows: list[list[Tensor]], like: Tensor) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows]).view_as(like)


@pytest.mark.parametrize("name", GATES)
@FEW
@given(
    data=st.data(),
    experts=st.integers(1, 6),
    lead=st.sampled_from([(5,), (2, 3), (1, 1)]),
    p=st.sampled_from([0.05, 0.4, 0.7, 0.95]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    biased=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_equal_the_loop(name, data, experts, lead, p, temperature, biased, dtype, seed):
    """Of weights and probs together; shares and chosen experts exactly."""
    torch.manual_seed(seed)
    k, scale = data.draw(st.integers(1, experts)), data.draw(st.sampled_from(scales(name)))
    bias = torch.randn(experts, dtype=dtype) if biased else None
    drawn = Drawn(k=k, p=p, temperature=temperature, scale=scale, bias=bias)
    logits = torch.randn(*lead, experts, dtype=dtype, requires_grad=True)
    gate = gated(name, logits, drawn)
    rows = [dumb_gates.choose(name, z, **asdict(drawn)) for z in logits.reshape(-1, experts)]
    weights = stacked([row.weights for row in rows], logits)
    probs = stacked([row.probs for row in rows], logits)
    torch.testing.assert_close(gate.weights, weights, **TOLERANCE[dtype])
    torch.testing.assert_close(gate.probs, probs, **TOLERANCE[dtype])
    shares = torch.tensor([row.shares for row in rows], dtype=dtype).view_as(logits)
    torch.testing.assert_close(gate.assignment, shares, **TOLERANCE[dtype])
    if gate.expert_indices is not None:
        assert gate.expert_indices.reshape(-1, k).tolist() == [row.chosen for row in rows]
    along = [torch.randn_like(weights), torch.randn_like(probs)]
    (grad,) = torch.autograd.grad([gate.weights, gate.probs], logits, along)
    (expected,) = torch.autograd.grad([weights, probs], logits, along)
    torch.testing.assert_close(grad, expected, **TOLERANCE[dtype])


def without_some(z: Tensor, staying: int) -> Tensor:
    """The logits with -inf for random experts of each token, as expert dropout leaves them; some always stay."""
    draw = torch.rand(z.shape)
    least = draw.topk(staying, dim=-1).values[..., -1:]
    return z.masked_fill((draw < 0.6) & (draw < least), -torch.inf)


@pytest.mark.parametrize(("name", "scale"), EVERY_GATE_AND_SCALE)
@pytest.mark.parametrize(("k", "p", "biased"), [(1, 0.4, False), (2, 0.7, True), (3, 0.95, False)])
def test_outputs_and_gradients_equal_the_loop_where_experts_are_left_out(name, scale, k, p, biased):
    torch.manual_seed(k)
    bias = torch.randn(4, dtype=torch.float64) if biased else None
    drawn = Drawn(k=k, p=p, temperature=0.7, scale=scale, bias=bias)
    leaf = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    logits = without_some(leaf, k)
    left_out = logits == -torch.inf
    assert left_out.any()
    gate = gated(name, logits, drawn)
    rows = [dumb_gates.choose(name, z, **asdict(drawn)) for z in logits]
    weights = stacked([row.weights for row in rows], logits)
    torch.testing.assert_close(gate.weights, weights)
    torch.testing.assert_close(gate.assignment, torch.tensor([row.shares for row in rows], dtype=torch.float64))
    assert not gate.weights[left_out].any() and not gate.assignment[left_out].any()
    (grad,) = torch.autograd.grad(gate.weights.square().sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(weights.square().sum(), leaf)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "scale"), EVERY_GATE_AND_SCALE)
def test_an_expert_that_is_left_out_does_nothing_however_the_others_round(name, scale, dtype):
    """Their probabilities may sum to less than 1, and their scores round to 0."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(200, 8, generator=generator) * 2).to(dtype)
    for logits in (z, z - 300):
        for expert in (0, 3, 7):
            left = logits.index_fill(-1, torch.tensor(expert), -torch.inf)
            gate = gated(name, left, Drawn(k=7, p=1.0, temperature=1.0, scale=scale, bias=None))
            assert not gate.weights[:, expert].any() and not gate.assignment[:, expert].any()


@FEW
@given(
    experts=st.integers(1, 6),
    lead=st.sampled_from([(), (4,), (2, 3)]),
    scale=st.sampled_from(["sum_to_one", "unit"]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_the_uniform_gate_equals_the_loop(experts, lead, scale, dtype):
    like = torch.zeros(lead, dtype=dtype)
    gate, row = (
        uniform_gate(like, experts, scale=MixtureScale(scale)),
        dumb_gates.uniform(torch.zeros(experts, dtype=dtype), scale=scale),
    )
    for ours, loop in zip(gate[:3], (row.probs, row.weights, row.shares), strict=True):
        torch.testing.assert_close(ours, torch.tensor(loop, dtype=dtype).expand(*lead, experts))


@FEW
@given(
    experts=st.integers(1, 6), lead=st.sampled_from([(4,), (2, 3)]), data=st.data(), dtype=st.sampled_from([*TOLERANCE])
)
def test_the_oracle_gate_equals_the_loop(experts, lead, data, dtype):
    count = torch.Size(lead).numel()
    wanted = data.draw(st.lists(st.integers(0, experts - 1), min_size=count, max_size=count))
    gate = oracle_gate(torch.tensor(wanted).view(lead), experts, dtype)
    rows = [dumb_gates.oracle(torch.zeros(experts, dtype=dtype), expert=expert) for expert in wanted]
    for ours, loop in (
        (gate.probs, [row.probs for row in rows]),
        (gate.weights, [row.weights for row in rows]),
        (gate.assignment, [row.shares for row in rows]),
    ):
        torch.testing.assert_close(ours, torch.tensor(loop, dtype=dtype).view(*lead, experts))
    assert gate.expert_indices is not None and gate.expert_indices.flatten().tolist() == wanted


@FEW
@given(experts=st.integers(1, 6), dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99))
def test_noisy_logits_and_their_gradients_equal_the_loop(experts, dtype, seed):
    torch.manual_seed(seed)
    leaves = [torch.randn(3, experts, dtype=dtype, requires_grad=True) for _ in range(2)]
    noise, along = torch.randn(3, experts, dtype=dtype), torch.randn(3, experts, dtype=dtype)
    ours = noisy_logits(leaves[0], leaves[1], noise)
    loop = torch.stack([dumb_gates.noisy(leaves[0][t], leaves[1][t], noise[t]) for t in range(3)])
    torch.testing.assert_close(ours, loop, **TOLERANCE[dtype])
    ours_grad, loop_grad = (torch.autograd.grad(z, leaves, along) for z in (ours, loop))
    torch.testing.assert_close(ours_grad, loop_grad, **TOLERANCE[dtype])


def test_noise_then_top_k_is_the_softmax_over_the_kept_logits_of_the_paper():
    """1701.06538, equation 3, which masks first and then takes the softmax."""
    torch.manual_seed(0)
    logits = noisy_logits(*(torch.randn(7, 5, dtype=torch.float64) for _ in range(3)))
    gate = top_k_gate(logits, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
    for t in range(7):
        kept = dumb_gates.largest(logits[t].tolist(), 2)
        powers = {e: logits[t, e].exp() for e in kept}
        for e in range(5):
            expected = powers[e] / sum(powers.values()) if e in kept else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(gate.weights[t, e], expected)


# --- away from ties the gates are differentiable, in both outputs


@pytest.mark.parametrize(("name", "scale"), [(n, s) for n, s in EVERY_GATE_AND_SCALE if s != "unit"])
def test_gradcheck_away_from_ties(name, scale):
    """unit is left out: a straight-through gradient is by design not that of its function."""
    logits = [[0.0, 1.0, 2.1, -1.0], [3.0, -2.0, 0.5, 1.5], [-0.4, -1.3, -0.2, -2.0]]
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    drawn = Drawn(k=2, p=0.7, temperature=0.7, scale=scale, bias=None)
    if name in MAY_CHOOSE_NONE:  # where no expert is on, the function is constant, and 0 is a kink
        z = torch.tensor(logits[:2], dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: gated(name, leaf, drawn)[:2], (z,))


def test_gradcheck_of_noisy_logits():
    leaves = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    noise = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z, size: noisy_logits(z, size, noise), leaves)


# --- scales


@pytest.mark.parametrize("name", [name for name in GATES if "raw" in scales(name)])
def test_unit_has_the_gradient_of_raw(name):
    torch.manual_seed(0)
    z, along = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    unit, raw = (
        torch.autograd.grad(gated(name, z, Drawn(k=2, p=0.6, temperature=0.8, scale=s, bias=None)).weights, z, along)[0]
        for s in ("unit", "raw")
    )
    torch.testing.assert_close(unit, raw)
    assert unit.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATES)
def test_a_unit_weight_is_exactly_one_or_zero(name, dtype):
    """Whatever the size of the score that lends its gradient, and also with moe.router_dtype=bfloat16."""
    torch.manual_seed(0)
    z = (torch.randn(200, 5) * 8).to(dtype)
    weights = gated(name, z, Drawn(k=2, p=0.6, temperature=1.0, scale="unit", bias=None)).weights
    assert torch.equal(weights, (weights > 0.5).to(dtype))


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_sum_to_one_sums_to_one_or_no_expert_is_on(name, top_k):
    torch.manual_seed(0)
    gate = gated(
        name,
        torch.randn(50, 5, dtype=torch.float64),
        Drawn(k=top_k, p=0.6, temperature=1.0, scale="sum_to_one", bias=None),
    )
    on = gate.assignment.sum(-1) > 0
    torch.testing.assert_close(gate.weights.sum(-1), on.double())
    assert bool(on.all()) is (name not in MAY_CHOOSE_NONE)


@pytest.mark.parametrize(("name", "scale"), EVERY_GATE_AND_SCALE)
def test_shares_sum_to_one_and_have_no_gradient(name, scale):
    """relu: or to 0, where no expert is on."""
    torch.manual_seed(0)
    gate = gated(
        name,
        torch.randn(50, 5, dtype=torch.float64, requires_grad=True),
        Drawn(k=2, p=0.6, temperature=1.0, scale=scale, bias=None),
    )
    assert not gate.assignment.requires_grad
    total = gate.assignment.sum(-1)
    torch.testing.assert_close(total, torch.where(total > 0, 1.0, 0.0).double())
    assert bool((total > 0).all()) is (name not in MAY_CHOOSE_NONE)
    torch.testing.assert_close(gate.probs.sum(-1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("scale", MixtureScale)
def test_a_token_without_an_active_expert_gets_gradient_zero_however_steep_the_loss(scale):
    z = torch.full((2, 3), -1.0, requires_grad=True)
    gate = relu_gate(z, scale=scale)
    assert not gate.weights.any()
    (grad,) = torch.autograd.grad((gate.weights + gate.probs).sum() * 1e3, z)
    assert torch.equal(grad, torch.zeros_like(z))


@pytest.mark.parametrize("gate", [top_k_gate, sigmoid_gate])
def test_a_selection_bias_chooses_and_does_not_weigh(gate):
    z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([-5.0, 0.0, 0.0, 5.0], requires_grad=True)
    plain, biased = (gate(z, top_k=4, temperature=1.0, scale=MixtureScale.raw, selection_bias=b) for b in (None, bias))
    torch.testing.assert_close(plain.weights, biased.weights)
    two = gate(z, top_k=2, temperature=1.0, scale=MixtureScale.raw, selection_bias=bias)
    assert two.expert_indices is not None and two.expert_indices.tolist() == [[3, 1]]
    torch.testing.assert_close(two.weights[0, [3, 1]], plain.weights[0, [3, 1]])
    assert torch.autograd.grad(two.weights.sum(), bias, allow_unused=True) == (None,)


# --- limits


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("gate", [top_k_gate, sigmoid_gate])
def test_a_top_k_outside_the_experts_is_refused(gate, top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, must be from 1 to the number of experts, 3"):
        gate(torch.zeros(2, 3), top_k=top_k, temperature=1.0, scale=MixtureScale.raw)


@pytest.mark.parametrize("top_p", [-0.1, 0.0, 1.1])
def test_a_top_p_outside_zero_to_one_is_refused(top_p):
    with pytest.raises(ValueError, match=f"top_p is {top_p}, must be above 0 and at most 1"):
        top_p_gate(torch.zeros(2, 3), top_p=top_p, temperature=1.0, scale=MixtureScale.raw)


def test_top_p_of_one_takes_every_expert_and_a_tiny_one_takes_the_best():
    z = torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64)
    every = top_p_gate(z, top_p=1.0, temperature=1.0, scale=MixtureScale.sum_to_one)
    torch.testing.assert_close(every.weights, soft_gate(z, temperature=1.0).weights)
    best = top_p_gate(z, top_p=1e-9, temperature=1.0, scale=MixtureScale.sum_to_one)
    torch.testing.assert_close(best.weights, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_edits_neither_its_logits_nor_its_bias(name):
    z, bias = torch.randn(4, 3), torch.randn(3)
    before = z.clone(), bias.clone()
    gated(name, z, Drawn(k=2, p=0.5, temperature=2.0, scale="unit", bias=bias))
    assert torch.equal(z, before[0]) and torch.equal(bias, before[1])
