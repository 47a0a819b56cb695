"""TargetChoice counts rows by their target and the chosen one as the loop does."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.metrics.target_choice import TargetChoice, TargetChoices
from lmoe.ops.mutual_information import adjusted_mutual_information
from lmoe.ops.router_targets import NO_TARGET, RowTargets
from tests.reference import dumb_metrics as dumb
from tests.reference.counted_work import counted_work

FEW = settings(max_examples=15, derandomize=True, deadline=None, database=None)
SITES = {"a": 4, "b": 3, "c": 4}
TARGETS, DOMAINS = ["code", "math", "sql"], ["chat", "code", "math", "sql"]
TARGET_OF_DOMAIN = torch.tensor([NO_TARGET, 0, 1, 2])


def packed(seed: int, sequences: int = 2, length: int = 9, rows: int = 3, first_domain: int = 1):
    """Sequences of `rows` rows of one token at least, padding behind: (routing, valid, row_ids, domain_ids)."""
    generator = torch.Generator().manual_seed(seed)
    routing = {}
    for site, experts in SITES.items():
        z = torch.randn(sequences, length, experts, generator=generator)
        routing[site] = SimpleNamespace(router_logits=z, routing_weights=z.softmax(-1))
    cuts = torch.rand(sequences, length - 1, generator=generator).argsort(-1)[:, :rows].sort(-1).values + 1
    place = torch.arange(length)
    row_ids = (place[None, :, None] >= cuts[:, None]).sum(-1)
    valid = row_ids < rows
    of_row = torch.randint(first_domain, len(DOMAINS), (sequences, rows + 1), generator=generator)
    domain_ids = of_row.gather(1, row_ids) * valid
    return routing, valid, row_ids * valid, domain_ids


def metric_of(*batches) -> TargetChoice:
    metric = TargetChoice(SITES, TARGETS, DOMAINS)
    for routing, valid, row_ids, domain_ids in batches:
        ids = TARGET_OF_DOMAIN[domain_ids].masked_fill(~valid, NO_TARGET)
        metric.update(routing, RowTargets(ids, len(TARGETS)), valid, row_ids, domain_ids)
    return metric


def updated(*batches) -> TargetChoices:
    return metric_of(*batches).compute()


def rows_of(valid: Tensor, row_ids: Tensor, domain_ids: Tensor) -> tuple[list[int], list[int]]:
    """(number of each valid token's row over all sequences, domain of each row)."""
    numbers: dict[tuple[int, int], int] = {}
    of_token, domains = [], []
    for b, t in valid.nonzero().tolist():
        key = (b, int(row_ids[b, t]))
        if key not in numbers:
            numbers[key] = len(numbers)
            domains.append(int(domain_ids[b, t]))
        of_token.append(numbers[key])
    return of_token, domains


@FEW
@given(seed=st.integers(0, 999))
def test_rows_choices_and_losses_equal_the_loop_in_packed_sequences_with_padding(seed):
    routing, valid, row_ids, domain_ids = packed(seed)
    found = updated((routing, valid, row_ids, domain_ids))
    of_token, domains = rows_of(valid, row_ids, domain_ids)
    targets = [int(TARGET_OF_DOMAIN[d]) for d in domains]
    assert found.rows == [targets.count(c) for c in range(3)] + [0] * 4
    assert list(found.sites) == list(SITES)
    for site, value in found.sites.items():
        chosen, loss = dumb.target_choices(routing[site].router_logits[valid], of_token, targets, 3)
        assert value.chosen == [*map(pytest.approx, chosen), *([[0.0] * 3] * 4)]
        assert value.loss == pytest.approx(loss, rel=1e-5)
        right = sum(chosen[c][c] for c in range(3)) / len(targets)
        assert found.accuracy()[site] == pytest.approx(right)


@FEW
@given(seed=st.integers(0, 999))
def test_rows_of_a_domain_that_is_no_target_are_counted_apart_and_not_in_the_accuracy(seed):
    batch = packed(seed, first_domain=0)
    routing, valid, row_ids, domain_ids = batch
    found = updated(batch)
    of_token, domains = rows_of(valid, row_ids, domain_ids)
    assert found.rows[3:] == [domains.count(0), 0, 0, 0]
    assert found.with_target == len(domains) - domains.count(0)
    kept = [row for row, domain in enumerate(domains) if domain]
    if not kept:
        assert found.accuracy() == {} == found.losses()
        return
    tokens = [n for n, row in enumerate(of_token) if row in kept]
    z = routing["a"].router_logits[valid][tokens]
    again = [kept.index(of_token[n]) for n in tokens]
    chosen, loss = dumb.target_choices(z, again, [domains[row] - 1 for row in kept], 3)
    assert found.sites["a"].chosen[:3] == [*map(pytest.approx, chosen)]
    assert sum(found.sites["a"].chosen[3]) == pytest.approx(domains.count(0))
    assert found.losses()["a"] == pytest.approx(loss, rel=1e-5)


def test_the_batches_may_be_cut_anywhere_between_sequences_and_padding_may_hold_anything():
    routing, valid, row_ids, domain_ids = packed(3, sequences=4)
    one = metric_of((routing, valid, row_ids, domain_ids))
    whole = one.compute()

    def part(rows: slice, fill: float | None = None):
        cut = {
            site: SimpleNamespace(
                **{
                    name: value[rows] if fill is None else value[rows].masked_fill(~valid[rows].unsqueeze(-1), fill)
                    for name, value in vars(r).items()
                }
            )
            for site, r in routing.items()
        }
        return cut, valid[rows], row_ids[rows], domain_ids[rows]

    other = metric_of(part(slice(0, 1)), part(slice(1, 4), torch.nan))
    halves = other.compute()
    assert halves.rows == whole.rows
    for site, value in whole.sites.items():
        assert halves.sites[site].chosen == [pytest.approx(row) for row in value.chosen]
        assert halves.sites[site].loss == pytest.approx(value.loss)
    assert other.agreement() == pytest.approx(one.agreement())


def single(domains: list[int], experts: list[int], lengths: list[int] | None = None) -> TargetChoice:
    """One row a sequence, whose tokens all choose one expert of four."""
    longest = max(lengths or [2])
    one_hot = torch.nn.functional.one_hot(torch.tensor(experts), 4).float()[:, None].expand(-1, longest, -1)
    valid = torch.arange(longest) < torch.tensor(lengths or [2] * len(domains))[:, None]
    of_token = torch.tensor(domains)[:, None].expand_as(valid) * valid
    metric = TargetChoice({"model": 4}, TARGETS, DOMAINS)
    ids = TARGET_OF_DOMAIN[of_token].masked_fill(~valid, NO_TARGET)
    routing = {"model": SimpleNamespace(router_logits=5 * one_hot, routing_weights=one_hot)}
    metric.update(routing, RowTargets(ids, 3), valid, torch.zeros_like(of_token), of_token)
    return metric


def test_an_expert_beyond_the_targets_stands_for_the_one_it_is_dealt_to():
    """Expert 3 is the second one of target 0; rows weigh alike, however long."""
    found = single([1, 1, 2, 3], [0, 3, 1, 0], lengths=[1, 9, 2, 3]).compute()
    assert found.sites["model"].chosen[:3] == [[2, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert found.accuracy() == {"model": 0.75}
    assert found.mean_shares()[:3] == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_the_agreement_of_experts_and_domains_is_that_of_the_rows_heaviest_experts():
    domains, experts = [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3]
    assert single(domains, experts).agreement()["model"] == pytest.approx(1.0)
    mixed = [0, 1, 1, 2, 2, 3, 3, 0]
    joint = torch.zeros(4, 4)
    for d, e in zip(domains, mixed, strict=True):
        joint[d, e] += 1
    assert single(domains, mixed).agreement()["model"] == pytest.approx(adjusted_mutual_information(joint))


def test_experts_agree_with_no_domains_where_rows_have_one():
    assert single([2, 2, 2, 2], [0, 0, 1, 1]).agreement() == single([2, 2, 2, 2], [0, 0, 0, 0]).agreement() == {}


def test_without_targets_all_rows_are_counted_by_their_domain():
    routing, valid, row_ids, domain_ids = packed(5)
    metric = TargetChoice(SITES, TARGETS, DOMAINS)
    metric.update(routing, None, valid, row_ids, domain_ids)
    found = metric.compute()
    assert found.rows[:3] == [0, 0, 0] and sum(found.rows[3:]) == 6
    assert found.accuracy() == found.losses() == {}
    assert sum(sum(row) for row in found.sites["b"].chosen) == pytest.approx(6)


def test_a_batch_of_eight_times_the_sequences_costs_eight_times_as_much_at_most():
    work = {sequences: counted_work(lambda n=sequences: updated(packed(0, n, 20))) for sequences in (8, 64)}
    assert work[64] < 8.1 * work[8]
