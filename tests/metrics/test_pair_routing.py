"""PairRouting compares the two answers of a pair as the loop does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.layers.routing import Routing
from lmoe.metrics.pair_routing import PairRouting, SitePairs
from tests.metrics.answered_rows import MODELS, PAIRS, answered, kept_tokens, rows_of, with_nan
from tests.reference import dumb_metrics as dumb
from tests.reference.host_sync import NoHostSync

FEW = settings(max_examples=15, derandomize=True, deadline=None, database=None)


def decided(*rows: list[int | None], experts: int = 3) -> Routing:
    """Rows of tokens that have one expert each, or none."""
    a = torch.tensor([[[float(e == number) for number in range(experts)] for e in row] for row in rows])
    return Routing(torch.zeros_like(a), torch.full_like(a, 1 / experts), a, a)


def updated(routing: dict[str, Routing], answers: Tensor, good: Tensor | None = None) -> dict[str, SitePairs]:
    metric = PairRouting({site: r.assignment.shape[-1] for site, r in routing.items()})
    metric.update(routing, answers, good)
    return metric.compute()


def close(found: dict[str, SitePairs], expected: dict[str, SitePairs]) -> None:
    assert found.keys() == expected.keys()
    for site, value in expected.items():
        assert found[site].overlap == (None if value.overlap is None else pytest.approx(value.overlap))
        assert found[site].load_chosen == pytest.approx(value.load_chosen)
        assert found[site].load_rejected == pytest.approx(value.load_rejected)


@pytest.mark.parametrize("kind", MODELS)
def test_overlap_and_loads_equal_the_loop_behind_every_router_and_padding_may_hold_anything(kind):
    """One of the three pairs has an empty answer, and does not count in the overlap."""
    rows = answered(kind)
    found = updated(with_nan(rows.routing, rows.answers), rows.answers)
    assert found.keys() == rows.num_experts.keys()
    for site, r in rows.routing.items():
        kept = kept_tokens(r, rows.answers)
        answers = [a[mask].tolist() for a, mask in zip(r.assignment, kept, strict=True)]
        chosen, rejected = answers[:PAIRS], answers[PAIRS:]
        assert [len(answer) for answer in rejected].count(0) == 1
        loads = [dumb.assignment_shares([a for answer in side for a in answer]) for side in (chosen, rejected)]
        expected = SitePairs(dumb.pair_overlap([*zip(chosen, rejected, strict=True)]), *loads)
        close({site: found[site]}, {site: expected})
        assert sum(found[site].load_chosen) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["top_k", "sites of several sizes", "relu", "model"])
def test_pairs_one_by_one_in_any_order_and_on_two_ranks_give_what_one_batch_gives(kind):
    rows = answered(kind)
    whole = updated(rows.routing, rows.answers)
    apart, rank = PairRouting(rows.num_experts), PairRouting(rows.num_experts)
    for metric, pair in ((apart, 2), (rank, 0), (apart, 1)):
        both = [pair, pair + PAIRS]
        metric.update(rows_of(rows.routing, both), rows.answers[both])
    apart.merge_state(rank)
    close(apart.compute(), whole)
    order = [2, 0, 1, 5, 3, 4]
    close(updated(rows_of(rows.routing, order), rows.answers[order]), whole)


@pytest.mark.parametrize("kind", ["top_k", "model", "relu"])
def test_chosen_and_rejected_exchanged_keep_the_overlap_and_exchange_the_loads(kind):
    rows = answered(kind)
    other = [3, 4, 5, 0, 1, 2]
    found, turned = updated(rows.routing, rows.answers), updated(rows_of(rows.routing, other), rows.answers[other])
    close(turned, {site: SitePairs(v.overlap, v.load_rejected, v.load_chosen) for site, v in found.items()})


@pytest.mark.parametrize("kind", ["sequence", "model"])
def test_a_router_that_decides_by_the_prompt_routes_both_answers_alike(kind):
    rows = answered(kind)
    for value in updated(rows.routing, rows.answers).values():
        assert value.overlap == pytest.approx(1)


@FEW
@given(st.permutations(range(6)))
def test_rows_that_are_no_pairs_may_come_in_any_order_and_have_no_overlap(order):
    rows = answered("top_k")
    good = torch.tensor([True] * PAIRS + [False] * PAIRS)
    pairs = updated(rows.routing, rows.answers)
    found = updated(rows_of(rows.routing, order), rows.answers[order], good[order])
    close(found, {site: value._replace(overlap=None) for site, value in pairs.items()})


def test_a_row_more_of_one_kind_is_no_error_where_rows_are_no_pairs():
    routing = {"a": decided([0], [1], [1])}
    found = updated(routing, torch.ones(3, 1, dtype=torch.bool), torch.tensor([True, False, True]))
    assert found == {"a": SitePairs(None, [0.5, 0.5, 0], [0, 1, 0])}


def test_answers_that_are_routed_alike_have_1_apart_0_and_their_length_does_not_matter():
    """Pair 0: the same shares in answers of two and four tokens; pair 1: other experts; pair 2: half and half."""
    routing = {"a": decided([0, 1, 2, 2], [0] * 4, [0, 1, 0, 1], [0, 1, 0, 1], [1] * 4, [1, 2, 1, 2])}
    answers = torch.ones(6, 4, dtype=torch.bool)
    answers[0, 2:] = False
    overlaps = []
    for pair in range(3):
        found = updated(rows_of(routing, [pair, pair + 3]), answers[[pair, pair + 3]])
        overlaps.append(found["a"].overlap)
    assert overlaps == [1, 0, 0.5]
    assert updated(routing, answers)["a"].overlap == 0.5


def test_tokens_without_an_expert_count_for_nothing_and_pairs_without_any_are_left_out():
    """Answers alike but for tokens without an expert have 1; of the second pair one answer has no expert at all."""
    routing = {"a": decided([0, 1, None], [2, 2, 2], [0, None, 1], [None] * 3), "b": decided(*[[0, 0, 0]] * 4)}
    answers = torch.ones(4, 3, dtype=torch.bool)
    found = updated(routing, answers)
    assert found["a"] == SitePairs(1, [0.2, 0.2, 0.6], [0.5, 0.5, 0])
    assert found["b"] == SitePairs(1, [1, 0, 0], [1, 0, 0])
    routing["a"] = decided(*[[None] * 3] * 4)
    assert updated(routing, answers).keys() == {"b"}


def test_tokens_on_which_no_expert_acts_count_for_nothing():
    r = decided([0, 1], [0, 2])
    acting = torch.tensor([[True, False], [True, False]])
    routing = {"a": Routing(r.router_logits, r.probs, r.routing_weights, r.assignment, acting=acting)}
    assert updated(routing, torch.ones(2, 2, dtype=torch.bool)) == {"a": SitePairs(1, [1, 0, 0], [1, 0, 0])}


def test_one_expert_has_all_of_both_answers():
    found = updated({"a": decided([0, 0], [0, 0], experts=1)}, torch.ones(2, 2, dtype=torch.bool))
    assert found == {"a": SitePairs(1, [1], [1])}


def test_without_an_answer_there_is_nothing():
    rows = answered("top_k")
    assert updated(rows.routing, torch.zeros_like(rows.answers)) == {}


def test_rows_that_are_no_pairs_and_marks_of_other_rows_are_refused():
    routing, answers = {"a": decided([0], [1], [2])}, torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"3 rows of answers are no pairs: .* say in `good`"):
        updated(routing, answers)
    with pytest.raises(ValueError, match=r"good is \(2,\); it must be \(3,\)"):
        updated(routing, answers, torch.tensor([True, False]))


def test_autocast_changes_nothing():
    rows = answered("top_p")
    with torch.autocast("cpu", torch.bfloat16):
        found = updated(rows.routing, rows.answers)
    assert found == updated(rows.routing, rows.answers)


def test_an_update_reads_nothing_back():
    rows = answered("sites of several sizes")
    metric = PairRouting(rows.num_experts)
    with NoHostSync():
        metric.update(rows.routing, rows.answers)
        metric.update(rows.routing, rows.answers, torch.arange(2 * PAIRS) % 2 == 0)
