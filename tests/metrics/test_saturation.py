"""Saturation compares the choices of the same tokens, kept in bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.metrics.saturation import Choices, ChosenExperts, routing_saturation
from tests.reference import dumb_metrics as dumb

FEW = settings(max_examples=20, derandomize=True, deadline=None, database=None)
SITES = {"a": 4, "b": 11, "c": 4}


def chosen(rows: int, experts: int, top_k: int, seed: int) -> Tensor:
    scores = torch.rand(rows, 5, experts, generator=torch.Generator().manual_seed(seed))
    return torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1 / top_k)


def used(assignment: Tensor, valid: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in assignment[valid]]


def choices(*batches: tuple[dict[str, Tensor], Tensor], sites: dict[str, int]) -> Choices:
    metric = ChosenExperts(sites)
    for assignment, valid in batches:
        metric.update(assignment, valid)
    return metric.compute()


def everyone(rows: int) -> Tensor:
    return torch.ones(rows, 5, dtype=torch.bool)


@FEW
@given(experts=st.integers(1, 20), data=st.data(), seed=st.integers(0, 99))
def test_it_equals_the_loop_over_sets_under_any_mask_with_any_number_of_choices(experts, data, seed):
    counts = st.integers(1, experts)
    earlier, later = (chosen(2, experts, data.draw(counts), seed + i) for i in range(2))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=10, max_size=10).filter(any))).view(2, 5)
    recorded = [choices(({"site": each}, valid), sites={"site": experts}) for each in (earlier, later)]
    expected = dumb.saturation(used(earlier, valid), used(later, valid))
    assert routing_saturation(recorded[0], recorded[1]) == {"site": pytest.approx(expected)}


def test_unchanged_choices_give_one_disjoint_ones_zero_and_half_kept_a_half():
    first = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 5])
    for order, expected in (([0, 1, 2, 3], 1.0), ([2, 3, 0, 1], 0.0), ([0, 2, 1, 3], 0.5)):
        recorded = [choices(({"site": a}, everyone(1)), sites={"site": 4}) for a in (first, first[..., order])]
        assert routing_saturation(recorded[0], recorded[1]) == {"site": expected}


def test_unrelated_choices_share_k_of_e():
    recorded = [choices(({"site": chosen(400, 8, 2, seed)}, everyone(400)), sites={"site": 8}) for seed in (1, 2)]
    assert routing_saturation(recorded[0], recorded[1])["site"] == pytest.approx(2 / 8, abs=0.02)


def test_tokens_that_choose_no_expert_later_do_not_count():
    one, none = torch.tensor([1.0, 0.0]), torch.zeros(2)
    earlier, later = torch.stack([one, one, one, none, one])[None], torch.stack([one, none, one, one, 1 - one])[None]
    recorded = [choices(({"site": a}, everyone(1)), sites={"site": 2}) for a in (earlier, later)]
    assert routing_saturation(recorded[0], recorded[1])["site"] == pytest.approx(2 / 4)
    assert routing_saturation(recorded[0], choices(({"site": 0 * later}, everyone(1)), sites={"site": 2})) == {
        "site": 0
    }


def test_experts_in_another_order_change_nothing():
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    plain, turned = (
        [
            choices(({"site": a[..., each]}, everyone(3)), sites={"site": 11})
            for a in (chosen(3, 11, 4, 0), chosen(3, 11, 4, 1))
        ]
        for each in (torch.arange(11), order)
    )
    assert routing_saturation(plain[0], plain[1]) == routing_saturation(turned[0], turned[1])


def test_batches_and_ranks_add_up_to_one_batch_and_packing_changes_nothing():
    assignment = {site: chosen(6, experts, 2, seed) for seed, (site, experts) in enumerate(SITES.items())}
    valid = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = choices((assignment, valid), sites=SITES)
    halves = [({site: a[rows] for site, a in assignment.items()}, valid[rows]) for rows in (slice(0, 2), slice(2, 6))]
    first, second = ChosenExperts(SITES), ChosenExperts(SITES)
    first.update(*halves[0])
    second.update(*halves[1])
    second.merge_state(first)  # torchmetrics puts the incoming tokens first
    packed = choices(({s: a[valid][None] for s, a in assignment.items()}, valid[valid][None]), sites=SITES)
    for other in (choices(*halves, sites=SITES), second.compute(), packed):
        assert all(torch.equal(other["chosen"][site], bits) for site, bits in whole["chosen"].items())


def test_a_token_takes_a_bit_an_expert_and_the_record_survives_a_file(tmp_path):
    recorded = choices(({s: chosen(6, e, 2, 0) for s, e in SITES.items()}, everyone(6)), sites=SITES)
    assert {site: tuple(bits.shape) for site, bits in recorded["chosen"].items()} == {
        "a": (30, 1),
        "b": (30, 2),
        "c": (30, 1),
    }
    torch.save(dict(recorded), tmp_path / "choices.pt")
    assert routing_saturation(torch.load(tmp_path / "choices.pt", weights_only=True), recorded) == dict.fromkeys(
        SITES, 1.0
    )


def test_a_single_token_is_compared_too():
    valid = torch.tensor([[False, True, False, False, False]])
    recorded = [choices(({"site": chosen(1, 3, 2, seed)}, valid), sites={"site": 3}) for seed in (0, 0)]
    assert routing_saturation(recorded[0], recorded[1]) == {"site": 1.0}


def test_other_tokens_other_sites_and_no_tokens_are_refused():
    one, two = (choices(({"site": chosen(rows, 4, 2, 0)}, everyone(rows)), sites={"site": 4}) for rows in (1, 2))
    with pytest.raises(ValueError, match="10 tokens chose experts at site earlier, 5 later: record both on the same"):
        routing_saturation(two, one)
    other = choices(({"site": chosen(1, 5, 2, 0)}, everyone(1)), sites={"site": 5})
    with pytest.raises(ValueError, match="compare checkpoints of one run"):
        routing_saturation(one, other)
    empty = choices(({"site": chosen(1, 4, 2, 0)}, ~everyone(1)), sites={"site": 4})
    with pytest.raises(ValueError, match="0 tokens"):
        routing_saturation(empty, empty)
    with pytest.raises(ValueError, match="a site that the metric does not know: extra"):
        ChosenExperts({"site": 4}).update({"site": chosen(1, 4, 2, 0), "extra": chosen(1, 4, 2, 0)}, everyone(1))
