"""Sites of a block that share their input compute what each computes alone."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmoe.layers import shared_input
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.shared_input import SharedInput
from tests.layers.small_site import D, O, Site, router_of

X = torch.linspace(-2, 2, 6 * D).sin().view(2, 3, D)


def itself(x: Tensor, place: int) -> Tensor:
    return x


class Block(nn.Module):
    """Sites on one input, in an order, with a Linear between them as k is between q and v."""

    def __init__(self, sites: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sites, self.between, self.order = nn.ModuleList(sites), nn.Linear(D, O), range(len(sites))
        self.inputs: Callable[[Tensor, int], Tensor] = itself

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.sites[place](self.inputs(x, place)) for place in self.order]
        return torch.stack(outputs).sin().sum(0) * self.between(x)


def lora(seed: int = 0, dropout: float = 0.0, use_dora: bool = False) -> LoRALinear:
    torch.manual_seed(seed)
    base = nn.Linear(D, O).requires_grad_(False)
    layer = LoRALinear(base, lora_r=2, scaling=1.5, dropout=dropout, use_dora=use_dora)
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


MADE: dict[str, Callable[[], list[nn.Module]]] = {
    "two mixtures": lambda: [Site(seed=1).make(), Site(seed=2, experts=4).make()],
    "two LoRAs": lambda: [lora(1), lora(2)],
    "three, of both kinds": lambda: [Site(seed=1).make(), lora(2), Site(seed=3, router="sigmoid").make()],
    "grouped beside stacked": lambda: [Site(seed=1, backend="grouped").make(), Site(seed=2).make()],
    "routers of float64": lambda: [Site(seed=s, router_dtype=torch.float64).make() for s in (1, 2)],
    "svd": lambda: [Site(seed=1, svd=True, rank=2).make(), Site(seed=2, svd=True, rank=2).make()],
    "one A": lambda: [Site(seed=1, shared_lora_A=True).make(), Site(seed=2).make()],
    "averaged factors": lambda: [Site(seed=1, mixing="factors").make(), Site(seed=2, mixing="factors").make()],
    "one expert always on": lambda: [Site(seed=1, shared_lora_r=2).make(), Site(seed=2, shared_lora_r=2).make()],
}
"""Sites that all may share."""


def pair(made: Callable[[], list[nn.Module]]) -> tuple[Block, Block]:
    """A block whose sites share, and one whose sites do not."""
    blocks = []
    for _ in range(2):
        sites = made()
        torch.manual_seed(9)
        blocks.append(Block(sites).train())
    SharedInput(list(blocks[0].sites)).attach(blocks[0])
    return blocks[0], blocks[1]


def result(block: nn.Module, x: Tensor = X, *, autocast: bool = False) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    leaf = x.clone().requires_grad_()
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = block(leaf * 1)
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y.float().square().sum(), [leaf, *trained.values()], allow_unused=True)
    return {"y": y.detach(), **dict(zip(["x", *trained], found, strict=True))}


@pytest.fixture(autouse=True)
def shared_in_float32_too(monkeypatch) -> None:
    """So that results can be compared without the rounding of bfloat16."""
    monkeypatch.setattr(shared_input, "joined_by_a_cast", lambda lora_A, dtype: True)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many sites each function computes."""
    sizes, real = [], shared_input.frozen_and_down

    def counting(x, sites, dtype):
        sizes.append(len(sites))
        return real(x, sites, dtype)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared_input, "frozen_and_down", counting)
        yield sizes


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_outputs_and_gradients_are_those_of_sites_that_do_not_share(made):
    shared, alone = pair(made)
    with counted() as sizes:
        found = result(shared)
    assert sizes == [len(shared.sites)]
    with counted() as sizes:
        expected = result(alone)
    assert sizes == [1] * len(shared.sites)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_they_are_the_same_but_for_rounding(made, base):
    blocks = pair(made)
    for block in blocks:
        for site in block.sites:
            site.base_layer.to(base)
    with counted() as sizes:
        found = result(blocks[0], X.to(base), autocast=True)
    assert sizes == [len(blocks[0].sites)]
    for name, expected in result(blocks[1], X.to(base), autocast=True).items():
        assert found[name].dtype == expected.dtype
        assert (found[name] - expected).norm() <= 0.02 * expected.norm(), name


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_are_the_same_to_the_last_bit_with_gradients_and_without(made, autocast):
    shared, alone = pair(made)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = shared(X)
        with torch.no_grad(), counted() as sizes:
            assert torch.equal(shared(X), expected)
    assert sizes == [len(shared.sites)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert (alone(X) - expected).norm() < 0.01 * expected.norm()


def test_sites_whose_factors_are_not_cast_compute_alone(monkeypatch):
    monkeypatch.undo()
    shared, alone = pair(MADE["three, of both kinds"])
    with counted() as sizes:
        found = result(shared)
    assert sizes == [1, 1, 1]
    assert all(torch.equal(found[name], expected) for name, expected in result(alone).items())
    with counted() as sizes:
        result(shared, autocast=True)
    assert sizes == [3]


def roles(name: str) -> str:
    return "router" if ".router." in name else "expert"


@pytest.mark.parametrize("frozen", ["router", "expert", "first site"])
def test_what_is_frozen_has_no_gradient_and_changes_none(frozen):
    shared, alone = pair(MADE["three, of both kinds"])
    expected = result(alone)
    for name, parameter in shared.named_parameters():
        off = name.startswith("sites.0") if frozen == "first site" else roles(name) == frozen and "between" not in name
        parameter.requires_grad_(parameter.requires_grad and not off)
    found = result(shared)
    assert 2 < len(found) < len(expected)
    torch.testing.assert_close(found, {name: expected[name] for name in found}, atol=1e-6, rtol=1e-5)


def refusals() -> dict[str, tuple[Callable[[Block], object], list[int]]]:
    def hooked(block: Block) -> None:
        block.sites[1].base_layer.register_forward_hook(lambda *_: None)

    def disabled(block: Block) -> None:
        block.sites[1].enabled = False

    def trained(block: Block) -> None:
        block.sites[1].base_layer.requires_grad_(True)

    def dropping(block: Block) -> None:
        block.sites[1].lora_dropout.p = 0.5

    return {
        "has hooks": (hooked, [2]),
        "is off": (disabled, [2]),
        "trains its base": (trained, [2]),
        "drops out": (dropping, [2]),
        "comes first": (lambda block: setattr(block, "order", (1, 0, 2)), [2, 1]),
        "is not called": (lambda block: setattr(block, "order", (0, 2)), [3]),
        "is called twice": (lambda block: setattr(block, "order", (0, 1, 1, 2)), [3, 1]),
        "gets another tensor": (
            lambda block: setattr(block, "inputs", lambda x, place: x * 2 if place == 1 else x),
            [3, 1],
        ),
    }


@pytest.mark.parametrize(("change", "sizes"), refusals().values(), ids=refusals())
def test_all_is_the_same_where_the_middle_one(change, sizes):
    shared, alone = pair(MADE["three, of both kinds"])
    for block in (shared, alone):
        change(block)
    with counted() as found:
        ours = result(shared)
    assert found == sizes
    theirs = result(alone)
    for name, expected in theirs.items():
        if expected is None:  # of a site that the block has not called
            assert ours[name] is None or not ours[name].any()
        else:
            torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("made", [lambda: [lora(1, 0.5), lora(2, 0.5)], lambda: [lora(1, use_dora=True), lora(2)]])
def test_dropout_and_dora_compute_alone_with_their_own_draws(made):
    shared, alone = pair(made)
    torch.testing.assert_close(result(shared), result(alone))


def test_a_site_that_is_called_without_its_block_computes_alone_with_what_it_holds_now():
    shared, _ = pair(MADE["two LoRAs"])
    first, second = shared.sites
    with counted() as sizes:
        first(X)
        with torch.no_grad():
            second.lora_B.mul_(2)
        y = second(X)
    assert sizes == [1, 1]
    torch.testing.assert_close(y, second.base_layer(X) + 1.5 * X @ (second.lora_B @ second.lora_A).T)


def test_nothing_is_kept_after_a_forward_even_one_that_fails():
    shared, alone = pair(MADE["two LoRAs"])
    held = shared.sites[0].shared_input._call
    shared(X)
    assert held.get() is None
    shared.inputs = lambda x, place: x if place == 0 else x[..., :1]
    with pytest.raises(RuntimeError):
        shared(X)
    assert held.get() is None
    shared.inputs = itself
    torch.testing.assert_close(result(shared), result(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("made", ["two LoRAs", "three, of both kinds"])
def test_a_block_that_is_checkpointed_shares_in_both_runs(made, early_stop):
    shared, alone = pair(MADE[made])

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = shared

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False, early_stop=early_stop)

    with counted() as sizes:
        found = result(Checkpointed())
    assert sizes == [len(shared.sites)] * 2
    expected = {f"block.{name}" if "." in name else name: value for name, value in result(alone).items()}
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert shared.sites[0].shared_input._call.get() is None


def test_two_threads_that_meet_in_a_block_get_each_their_own():
    shared, alone = pair(MADE["three, of both kinds"])
    inputs, found, meeting = [X, X * 3], {}, threading.Barrier(2)

    def waiting(x: Tensor, place: int) -> Tensor:
        meeting.wait(10)  # both stand before the same site
        return x

    shared.inputs = waiting

    def run(number: int) -> None:
        found[number] = shared(inputs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number, x in enumerate(inputs):
        torch.testing.assert_close(found[number], alone(x), atol=1e-6, rtol=1e-5)


def test_the_trace_and_its_losses_are_the_same():
    found = []
    for block in pair(MADE["two mixtures"]):
        traces, leaf = [router_of(site).trace for site in block.sites], X.clone().requires_grad_()
        with traces[0].recording(torch.ones(2, 3, dtype=torch.bool)), traces[1].recording(torch.ones(2, 3).bool()):
            y = block(leaf)
        loss = y.sum() + sum(trace.auxiliary_loss() for trace in traces)
        trained = [p for p in block.parameters() if p.requires_grad]
        logits = [trace.routing["site"].router_logits.detach() for trace in traces]
        found.append((loss.detach(), logits, torch.autograd.grad(loss, [leaf, *trained])))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_shares_among_its_own_sites(copied):
    shared, _ = pair(MADE["two LoRAs"])
    twin = copied(shared)
    assert all(site.shared_input.sites == tuple(twin.sites) for site in twin.sites)
    before = shared(X)
    with torch.no_grad():
        twin.sites[1].lora_B.zero_()
    with counted() as sizes:
        assert not torch.allclose(twin(X), before)
    assert sizes == [2]
    torch.testing.assert_close(shared(X), before)


def test_sharing_adds_no_name_to_the_state():
    shared, alone = pair(MADE["three, of both kinds"])
    assert list(shared.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in shared.named_modules()] == [name for name, _ in alone.named_modules()]
