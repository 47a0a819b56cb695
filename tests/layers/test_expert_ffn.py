"""Experts that are whole feed-forward blocks: against the loop over tokens and experts, and what follows from it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu
from torch.utils.checkpoint import checkpoint

from lmoe.layers.context import PromptRows
from lmoe.layers.expert_ffn import ExpertFFN
from lmoe.ops import expert_blocks
from tests.layers.loop_routing import ROUTERS, info_for_router, known, loop_choices, scales
from tests.layers.small_ffn import KINDS, SCALING, I, make, trained, whole_experts
from tests.layers.small_site import D, Site
from tests.reference import dumb_experts

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
EVERY_KIND = [
    *((router, scales(router)[i % len(scales(router))], 2, kind) for router in ROUTERS for i, kind in enumerate(KINDS)),
    *(("top_k", scale, 1, kind) for scale, kind in zip(("raw", "unit"), KINDS, strict=False)),
]
"""Router, scale, top_k and kind of block: every router with every scale and kind; top_k = 1 takes no sum_to_one."""


@pytest.fixture(autouse=True)
def small_experts_in_blocks(monkeypatch) -> None:
    """Blocks of rows, and several for an expert, wherever they can be."""
    monkeypatch.setattr(expert_blocks, "FEWEST_VALUES", 0)
    monkeypatch.setattr(expert_blocks, "MOST_ROWS", 2)


def batch(*, seed: int = 3) -> tuple[Tensor, Tensor]:
    """(B, T, D) hidden states, and the mask of their valid tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, D, generator=generator), torch.ones(2, 3, dtype=torch.bool)


def loop(made: Site, ffn: ExpertFFN, x: Tensor, facts: dict) -> Tensor:
    """Expert by expert, from the full weights of each."""
    _, choices = loop_choices(made, ffn.router, x, facts)
    flat = dumb_experts.mixture(
        x.reshape(-1, D), whole_experts(ffn), [c.chosen for c in choices], [c.weights for c in choices]
    )
    return flat.view(x.shape)


def run(ffn: ExpertFFN, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The output, where the router knows what it must."""
    with known(ffn.router, x, torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid):
        return ffn(x)


def agree(ours: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    """Values and gradients, by name."""
    torch.testing.assert_close(ours, expected, **CLOSE)
    along = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    grads, loops = (
        torch.autograd.grad((y * along).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for y in (ours, expected)
    )
    for name, mine, theirs in zip(leaves, grads, loops, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- against the loop


def test_the_table_has_every_router_with_every_scale_and_every_kind():
    assert {(router, scale) for router, scale, *_ in EVERY_KIND} == {(r, s) for r in ROUTERS for s in scales(r)}
    assert {(router, kind) for router, *_, kind in EVERY_KIND} == {(r, k) for r in ROUTERS for k in KINDS}


@pytest.mark.parametrize(("router", "scale", "top_k", "kind"), EVERY_KIND)
def test_outputs_and_all_gradients_equal_the_loop_over_whole_experts(router, scale, top_k, kind):
    """On one base for all, and on copies that have gone ways of their own."""
    made = Site(router=router, scale=scale, top_k=top_k, experts=4)
    x, valid = batch()
    x.requires_grad_()
    for share_base in (True, False):
        ffn = make(made, kind, share_base=share_base)
        if not share_base:
            with torch.no_grad():
                for parameter in ffn.base_copies.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        facts = info_for_router(ffn.router, x, valid)
        with ffn.router.context.with_batch_info(**facts):
            agree(ffn(x), loop(made, ffn, x, facts), {"x": x, **trained(ffn)})


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize(
    ("kind", "adapted"),
    [
        ("gated", ("gate_proj",)),
        ("gated", ("up_proj",)),
        ("gated with biases", ("down_proj",)),
        ("fused", ("gate_up_proj",)),
        ("Conv1D", ("c_proj",)),
    ],
)
def test_only_the_chosen_linears_carry_branches(kind, adapted, share_base):
    made = Site(experts=3)
    ffn, (x, _) = make(made, kind, adapted=adapted, share_base=share_base), batch()
    carrying = {name.split(".")[0] for name, _ in ffn.named_parameters() if "lora_" in name}
    assert carrying == set(adapted)
    x.requires_grad_()
    agree(ffn(x), loop(made, ffn, x, {}), {"x": x, **trained(ffn)})


# --- identities


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", [name for name in ROUTERS if "sum_to_one" in scales(name)])
def test_zero_lora_B_and_weights_that_sum_to_one_give_the_block(router, kind, share_base):
    ffn, (x, valid) = make(Site(router=router, scale="sum_to_one"), kind, share_base=share_base), batch()
    with torch.no_grad():
        for name, parameter in ffn.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    torch.testing.assert_close(run(ffn, x, valid), ffn.base_layer(x), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_are_one_block_with_merged_weights_whatever_the_router_says(kind):
    ffn, (x, _) = make(Site(scale="sum_to_one", experts=3), kind), batch()
    with torch.no_grad():
        for name, parameter in ffn.named_parameters():
            if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B"):
                parameter.copy_(parameter[:1].clone().expand_as(parameter))
    merged = copy.deepcopy(ffn.base_layer)
    with torch.no_grad():
        for name in ffn.names.linears:
            linear, branch = merged.get_submodule(name), ffn.get_submodule(name)
            delta = SCALING * branch.lora_B[0] @ branch.lora_A[0]
            linear.weight.add_(delta.t() if kind == "Conv1D" else delta)
    y = ffn(x)
    torch.testing.assert_close(y, merged(x), **CLOSE)
    (gradient,) = torch.autograd.grad(y.sum(), ffn.router.weight)
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["gated with biases", "ungated", "Conv1D"])
@pytest.mark.parametrize("share_base", [True, False])
def test_a_bias_counts_as_often_as_the_weights_sum_to(kind, share_base):
    """Twice the weights, twice the output, bias and all."""
    once, twice = (
        make(Site(router="oracle", experts=2), kind, share_base=share_base),
        make(Site(router="uniform", scale="unit", experts=2), kind, share_base=share_base),
    )
    with torch.no_grad():
        for ffn in (once, twice):  # all experts equal: unit weights of two of them add up to 2
            for name, parameter in ffn.named_parameters():
                if name.endswith("lora_B"):
                    parameter.zero_()
    once.base_layer.load_state_dict(twice.base_layer.state_dict())
    if not share_base:
        once.base_copies.load_state_dict(twice.base_copies.state_dict())
    x, valid = batch()
    torch.testing.assert_close(run(twice, x, valid), 2 * run(once, x, valid), **CLOSE)
    down = once.base_layer.get_submodule(once.names.down)
    assert down.bias.abs().min() > 1e-3  # or the claim would be empty


@pytest.mark.parametrize("kind", KINDS)
def test_copies_that_nobody_has_trained_equal_the_shared_base_in_outputs_and_gradients(kind):
    made = Site(router="top_k", scale="raw", experts=3)
    shared, copied = make(made, kind), make(made, kind, share_base=False)
    missing = copied.load_state_dict(shared.state_dict(), strict=False)
    assert all(name.startswith("base_copies.") for name in missing.missing_keys) and not missing.unexpected_keys
    with torch.no_grad():
        for name in shared.names.linears:
            linear, copies = shared.base_layer.get_submodule(name), copied.base_copies[name]
            copies.weight.copy_((linear.weight.t() if kind == "Conv1D" else linear.weight).expand_as(copies.weight))
            if copies.bias is not None:
                copies.bias.copy_(linear.bias.expand_as(copies.bias))
    x, _ = batch()
    x.requires_grad_()
    outputs, grads = [], []
    for ffn in (shared, copied):
        outputs.append(ffn(x))
        common = {name: p for name, p in trained(ffn).items() if "base_copies" not in name}
        grads.append((list(common), torch.autograd.grad(outputs[-1].square().mean(), [x, *common.values()])))
    torch.testing.assert_close(*outputs, **CLOSE)
    assert grads[0][0] == grads[1][0]
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copies_start_as_the_block(kind):
    ffn = make(Site(experts=3), kind, share_base=False)
    for name in ffn.names.linears:
        linear, copies = ffn.base_layer.get_submodule(name), ffn.base_copies[name]
        for e in range(3):
            assert torch.equal(copies.weight[e], linear.weight.t() if kind == "Conv1D" else linear.weight)
            assert (copies.bias is None) == (linear.bias is None)
            assert copies.bias is None or torch.equal(copies.bias[e], linear.bias)
        assert copies.weight.untyped_storage().nbytes() == copies.weight.nbytes


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_changing_the_copy_of_one_expert_changes_the_tokens_of_that_expert_alone(name):
    ffn = make(Site(experts=4, top_k=2), share_base=False)
    x = torch.randn(4, 6, D)
    with torch.no_grad():
        before, indices = ffn(x), ffn.router(x).expert_indices
        ffn.base_copies[name].weight[1].add_(0.5)
        after = ffn(x)
    uses = (indices == 1).any(-1)
    assert 0 < int(uses.sum()) < uses.numel()
    changed = (before != after).any(-1)
    assert torch.equal(changed, uses)


def test_an_optimizer_step_on_the_copies_moves_those_of_experts_with_tokens_and_leaves_the_block():
    ffn = make(Site(router="oracle", experts=3), share_base=False)
    block = {name: values.clone() for name, values in ffn.base_layer.state_dict().items()}
    before = {name: values.detach().clone() for name, values in ffn.base_copies.named_parameters()}
    x, _ = batch()
    with ffn.router.context.with_batch_info(expert_of_token=torch.full((2, 3), 2)):
        ffn(x).square().sum().backward()
    torch.optim.SGD(ffn.base_copies.parameters(), lr=0.1).step()
    assert len(before) == 3
    for name, values in ffn.base_copies.named_parameters():
        moved = [not torch.equal(values[e], before[name][e]) for e in range(3)]
        assert moved == [False, False, True], name
    assert all(torch.equal(values, block[name]) for name, values in ffn.base_layer.state_dict().items())
    assert all(not parameter.requires_grad for parameter in ffn.base_layer.parameters())


@pytest.mark.parametrize("share_base", [True, False])
def test_permuting_the_experts_leaves_the_output(share_base):
    made, order = Site(experts=4, bias=True), torch.tensor([2, 0, 3, 1])
    ffn = make(made, "ungated", share_base=share_base)
    twin = copy.deepcopy(ffn)
    if not share_base:
        with torch.no_grad():
            for parameter in ffn.base_copies.parameters():
                parameter.add_(torch.randn_like(parameter))
        twin = copy.deepcopy(ffn)
    with torch.no_grad():
        for name, values in twin.state_dict().items():
            if not name.startswith("base_layer."):
                values.copy_(values[order].clone())
    x, _ = batch()
    torch.testing.assert_close(twin(x), ffn(x), **CLOSE)


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_is_the_block_bitwise(kind, share_base):
    ffn, (x, _) = make(Site(), kind, share_base=share_base), batch()
    assert not torch.allclose(ffn(x), ffn.base_layer(x), atol=1e-3)
    ffn.enabled = False
    assert torch.equal(ffn(x), ffn.base_layer(x))


# --- dropout


@pytest.mark.parametrize("kind", ["gated", "fused", "ungated"])
def test_dropout_draws_one_mask_of_x_for_all_experts_and_linears_that_read_it(kind):
    """Against the loop, told the mask: the low-rank branches read m * x, and the frozen weights x itself."""
    made = Site(experts=3, dropout=0.5)
    firsts = {"gated": ("gate_proj", "up_proj"), "fused": ("gate_up_proj",), "ungated": ("fc1",)}[kind]
    ffn, (x, _) = make(made, kind, adapted=firsts).train(), batch()
    torch.manual_seed(5)
    ours = ffn(x)
    torch.manual_seed(5)
    dropped = dropout(x.reshape(-1, D), 0.5)
    assert (dropped == 0).any() and (dropped != 0).any()
    _, choices = loop_choices(made, ffn.router, x, {})
    experts = whole_experts(ffn)
    rows = []
    for token, less, choice in zip(x.reshape(-1, D), dropped, choices, strict=True):
        y = token * 0
        for e in choice.chosen:
            inner = experts.inner(
                *(
                    w.base[e] @ token
                    + (0 if w.bias[e] is None else w.bias[e])
                    + w.scale * (w.lora_B[e] @ (w.lora_A[e] @ less))
                    for w in experts.firsts
                )
            )
            y = y + choice.weights[e] * experts.down.of(inner, e)
        rows.append(y)
    torch.testing.assert_close(ours.view(-1, D), torch.stack(rows), **CLOSE)


def test_dropout_acts_on_every_branch_and_in_training_only():
    for name in ("gate_proj", "up_proj", "down_proj"):
        ffn, (x, _) = make(Site(dropout=0.5), adapted=(name,)), batch()
        assert torch.equal(ffn(x), ffn(x))
        assert not torch.equal(ffn.train()(x), ffn.eval()(x)), name


@pytest.mark.parametrize("share_base", [True, False])
def test_the_dropout_of_the_block_itself_acts_on_the_sum_in_training(share_base):
    ffn, (x, _) = make(Site(), "Conv1D", share_base=share_base, resid_pdrop=0.5), batch()
    quiet = ffn(x)
    torch.manual_seed(5)
    ours = ffn.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, dropout(quiet.view(-1, D), 0.5).view(x.shape), **CLOSE)


# --- types and shapes


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["top_k", "soft", "relu"])
def test_bfloat16_autocast_is_close_and_gradients_stay_float32(router, kind, share_base):
    ffn, (x, _) = (
        make(Site(router=router, scale="raw" if router != "soft" else "unit"), kind, share_base=share_base),
        batch(),
    )
    x.requires_grad_()
    exact = ffn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ffn(x)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    leaves = {"x": x, **trained(ffn)}
    grads = torch.autograd.grad(rounded.float().square().mean(), list(leaves.values()))
    expected = torch.autograd.grad(exact.square().mean(), list(leaves.values()))
    for name, mine, theirs in zip(leaves, grads, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_block_takes_float32_branches_and_returns_bfloat16(kind, share_base):
    ffn = make(Site(), kind, share_base=share_base)
    exact, (x, _) = copy.deepcopy(ffn), batch()
    ffn.base_layer.bfloat16()
    if not share_base:
        ffn.base_copies.bfloat16()
    x = x.bfloat16().requires_grad_()
    y = ffn(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    reference = exact(x.detach().float())
    assert (y - reference).norm() < 0.03 * reference.norm()
    for name, parameter in trained(ffn).items():
        wanted = torch.bfloat16 if "base_copies" in name else torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == wanted, name


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_transposed_expanded_and_empty_inputs_are_taken_as_they_are(router, share_base):
    ffn = make(Site(router=router), "ungated", share_base=share_base)
    for x in (torch.randn(3, 2, D).transpose(0, 1), torch.randn(1, 1, D).expand(2, 3, D), torch.randn(0, 3, D)):
        torch.testing.assert_close(run(ffn, x), run(ffn, x.contiguous()))
        assert run(ffn, x).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_input_nor_parameters_are_edited_in_place(kind, training):
    ffn, (x, _) = make(Site(dropout=0.3 if training else 0.0), kind), batch()
    before = x.clone(), {name: values.clone() for name, values in ffn.state_dict().items()}
    ffn.train(training)(x)
    assert torch.equal(x, before[0])
    assert all(torch.equal(values, before[1][name]) for name, values in ffn.state_dict().items())


def test_one_decision_a_prompt_sends_all_its_tokens_to_the_same_experts():
    ffn, (x, valid) = make(Site(router="sequence", experts=4)), batch()
    rows = PromptRows.single(torch.tensor([[True, True, False]] * 2))
    with ffn.router.context.with_batch_info(rows=rows), ffn.router.trace.recording(valid) as trace:
        ffn(x)
    chosen = trace.routing["site"].expert_indices
    assert chosen.shape == (2, 3, 2)
    assert torch.equal(chosen, chosen[:, :1].expand_as(chosen))


# --- in blocks of rows


def by_rows(ffn: ExpertFFN) -> ExpertFFN:
    """The same, computed for all rows at once, which a hook asks for that hears of the activation."""
    other = copy.deepcopy(ffn)
    other.base_layer.get_submodule(other.names.activation).register_forward_hook(lambda *_: None)
    return other


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.05)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["top_k", "soft"])
def test_blocks_of_rows_give_outputs_and_gradients_of_all_rows_at_once(router, kind, autocast, tolerance):
    """Those of float32; under autocast both ways are as far from them."""
    ffn, (x, _) = make(Site(router=router), kind), batch()
    found = []
    for way, rounded in ((ffn, autocast), (by_rows(ffn), False)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounded):
            y = run(way, leaf)
        grads = torch.autograd.grad(y.float().square().mean(), [leaf, *trained(way).values()])
        found.append([y.detach(), *grads])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_checkpointing_gives_the_same_gradients_to_the_last_bit():
    ffn, (x, _) = make(Site()), batch()
    found = []
    for call in (ffn, lambda leaf: checkpoint(ffn, leaf, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append([y, *torch.autograd.grad(y.square().mean(), [leaf, *trained(ffn).values()])])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_a_hook_on_the_activation_hears_of_all_rows_once():
    ffn, (x, _) = make(Site()), batch()
    seen = []
    ffn.base_layer.act_fn.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    run(ffn, x.requires_grad_()).sum().backward()
    assert seen == [(2 * 3 * 2, I)]


def test_small_experts_are_computed_for_all_rows_at_once(monkeypatch):
    made, (x, _) = make(Site()), batch()
    calls = []
    made.base_layer.act_fn.forward = lambda gate: calls.append(len(gate)) or silu(gate)
    for fewest in (0, 1):  # 12 rows of 16 inner values
        monkeypatch.setattr(expert_blocks, "FEWEST_VALUES", fewest * 12 * I // made.settings.num_experts + fewest)
        run(made, x)
    assert max(calls[:-1]) <= 2 and calls[-1] == 12


def test_an_activation_that_trains_gets_its_gradient():
    ffn, (x, _) = make(Site(), "ungated"), batch()
    ffn.base_layer.activation_fn = nn.PReLU()
    run(ffn, x).sum().backward()
    assert ffn.base_layer.activation_fn.weight.grad.any()
