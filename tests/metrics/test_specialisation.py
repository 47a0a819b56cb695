"""DomainSpecialisation finds what was planted, and is not fooled by tokens that depend on their row."""

import math
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.metrics.specialisation import (
    DomainSpecialisation,
    SiteSpecialisation,
    mean_over_sites,
    specialisation_rows,
    specialisation_summary,
)
from lmoe.ops.mutual_information import mutual_information
from tests.reference import dumb_metrics as dumb

DOMAINS = ["code", "chat", "math", "sql"]
FEW = settings(max_examples=15, derandomize=True, deadline=None, database=None)


def chosen(experts_BT: Tensor, experts: int) -> Tensor:
    """(B, T, E) assignment of the given experts, one a token."""
    return torch.nn.functional.one_hot(experts_BT, experts).float()


def measured(assignment: Tensor, row_domains: Tensor, *, permutations: int = 200) -> SiteSpecialisation:
    """One row a sequence, without padding."""
    metric = DomainSpecialisation({"site": assignment.shape[-1]}, DOMAINS, permutations)
    shape = assignment.shape[:2]
    valid, row_ids = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    metric.update({"site": assignment}, valid, row_ids, row_domains[:, None].expand(shape))
    return metric.compute()["site"]


def test_an_expert_for_each_domain_tells_the_domain():
    domains = torch.tensor([0] * 10 + [1] * 20 + [2] * 5 + [3] * 5)
    site = measured(chosen(domains[:, None].expand(-1, 6), 4), domains)
    assert site.information == pytest.approx(dumb.entropy([0.25, 0.5, 0.125, 0.125]))
    assert site.normalised == pytest.approx(1.0) and site.adjusted == pytest.approx(1.0)
    assert site.p_value == pytest.approx(1 / 201)
    assert site.excess > 10 * site.null_std


def test_experts_chosen_at_random_for_each_token_show_no_excess():
    torch.manual_seed(0)
    domains = torch.arange(40) % 4
    site = measured(chosen(torch.randint(0, 8, (40, 50)), 8), domains)
    assert 0 < site.information < 0.02
    assert abs(site.excess) < 3 * site.null_std
    assert abs(site.adjusted) < 0.01
    assert site.p_value > 0.05


def test_rows_that_stick_to_an_expert_fool_a_null_over_tokens_but_not_the_null_over_rows():
    """Each row of 50 tokens has an expert of its own, drawn without looking at the domain."""
    torch.manual_seed(1)
    rows, domains = 24, torch.arange(24) % 4
    experts_R = torch.randint(0, 4, (rows,))
    site = measured(chosen(experts_R[:, None].expand(-1, 50), 4), domains)
    tokens_E, labels = experts_R.repeat_interleave(50), domains.repeat_interleave(50)
    by_tokens = []
    for _ in range(50):
        shuffled = labels[torch.randperm(len(labels))]
        joint = torch.zeros(4, 4).index_put_((shuffled, tokens_E), torch.ones(len(labels)), accumulate=True)
        by_tokens.append(float(mutual_information(joint)))
    assert site.information > 10 * max(by_tokens)
    assert site.p_value > 0.05
    assert abs(site.excess) < 2 * site.null_std


def test_p_values_of_routers_that_ignore_domains_are_spread_evenly():
    torch.manual_seed(0)
    domains = torch.arange(24) % 4
    found = [
        measured(chosen(torch.randint(0, 4, (24, 1)).expand(-1, 5), 4), domains, permutations=50).p_value
        for _ in range(60)
    ]
    assert 0.4 < fmean(found) < 0.65
    assert sum(p <= 0.1 for p in found) <= 14  # 6 expected; 14 or fewer with probability 0.999


def test_an_expert_that_one_domain_prefers_is_found():
    """Experts are random, but a third of the tokens of sql go to expert 3."""
    torch.manual_seed(0)
    domains = torch.arange(80) % 4
    experts = torch.randint(0, 4, (80, 30))
    experts = torch.where((domains[:, None] == 3) & (torch.rand(80, 30) < 1 / 3), 3, experts)
    site = measured(chosen(experts, 4), domains)
    assert site.p_value == pytest.approx(1 / 201)
    assert 0.02 < site.information < 0.1


def test_a_collapsed_site_tells_nothing_and_few_stray_tokens_do_not_make_it_specialised():
    """All of one row's 8 tokens in 1280 stray: over H(E) they would count for much, over ln E they do not."""
    domains = torch.arange(160) % 4
    experts = torch.zeros(160, 8, dtype=torch.long)
    site = measured(chosen(experts, 8), domains)
    assert (site.information, site.normalised, site.p_value) == (pytest.approx(0, abs=1e-12), pytest.approx(0), 1.0)
    experts[3] = 5
    assert measured(chosen(experts, 8), domains).normalised < 0.01


def test_one_domain_or_one_expert_leaves_nothing_to_tell():
    for assignment, domains in (
        (chosen(torch.randint(0, 3, (5, 4)), 3), torch.zeros(5, dtype=torch.long)),
        (torch.ones(5, 4, 1), torch.arange(5) % 4),
    ):
        site = measured(assignment, domains)
        assert (site.normalised, site.adjusted, site.p_value) == (0.0, 0.0, 1.0)


def batch(seed: int, rows: int, sites: dict[str, int], length: int = 6):
    """Rows of 1 to `length` tokens, padded, soft assignments: ({site: (B, T, E)}, valid, row ids, domains)."""
    generator = torch.Generator().manual_seed(seed)
    assignment = {s: torch.randn(rows, length, e, generator=generator).mul(3).softmax(-1) for s, e in sites.items()}
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    valid = torch.arange(length) < lengths
    domains = torch.randint(0, 4, (rows, 1), generator=generator).expand(-1, length) * valid
    return assignment, valid, torch.zeros(rows, length, dtype=torch.long), domains


SITES = {"a": 4, "b": 2, "c": 4}


def after(*batches, sites=SITES) -> dict[str, SiteSpecialisation]:
    metric = DomainSpecialisation(sites, DOMAINS, permutations=20)
    for each in batches:
        metric.update(*each)
    return metric.compute()


def assert_same(one: dict[str, SiteSpecialisation], other: dict[str, SiteSpecialisation]) -> None:
    assert one.keys() == other.keys()
    for site, value in one.items():
        assert (value.information, value.bound) == pytest.approx((other[site].information, other[site].bound))
        assert value.null == pytest.approx(other[site].null, abs=1e-12)


@FEW
@given(seed=st.integers(0, 99))
def test_observed_values_equal_the_loop_over_valid_tokens(seed):
    assignment, valid, row_ids, domains = batch(seed, 5, SITES)
    for site, value in after((assignment, valid, row_ids, domains)).items():
        labels, loads = domains[valid].tolist(), assignment[site][valid].tolist()
        assert value.information == pytest.approx(dumb.mutual_information(labels, loads), abs=1e-6)
        of_domain = dumb.entropy([labels.count(d) / len(labels) for d in range(4)])
        assert value.bound == pytest.approx(min(of_domain, math.log(SITES[site])), abs=1e-6)


@FEW
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_experts_or_domains_in_another_order_change_nothing(order, seed):
    assignment, valid, row_ids, domains = batch(seed, 6, {"a": 4})
    original = after((assignment, valid, row_ids, domains), sites={"a": 4})
    experts = {"a": assignment["a"][..., order]}
    assert_same(after((experts, valid, row_ids, domains), sites={"a": 4}), original)
    assert_same(after((assignment, valid, row_ids, torch.tensor(order)[domains]), sites={"a": 4}), original)


def test_packed_rows_equal_rows_on_their_own():
    """Six padded rows, and the same six in two sequences of three, behind one another."""
    assignment, valid, row_ids, domains = batch(0, 6, SITES)
    length = max(int(valid[start : start + 3].sum()) for start in (0, 3))

    def packed(tensor: Tensor, fill: float) -> Tensor:
        out = tensor.new_full((2, length, *tensor.shape[2:]), fill)
        for i, start in enumerate((0, 3)):
            kept = tensor[start : start + 3][valid[start : start + 3]]
            out[i, : len(kept)] = kept
        return out

    together = after(
        (
            {site: packed(a, 0.5) for site, a in assignment.items()},
            packed(valid, False),
            packed(torch.arange(6)[:, None].expand_as(valid) % 3, 2),
            packed(domains, 0),
        )
    )
    assert_same(together, after((assignment, valid, row_ids, domains)))


def part(whole, rows: slice):
    assignment, *rest = whole
    return {site: a[rows] for site, a in assignment.items()}, *(t[rows] for t in rest)


def test_two_halves_equal_one_batch_and_reset_forgets():
    whole = batch(1, 8, SITES)
    assert_same(after(part(whole, slice(0, 3)), part(whole, slice(3, 8))), after(whole))
    metric = DomainSpecialisation(SITES, DOMAINS, permutations=20)
    metric.update(*batch(2, 4, SITES))
    metric.reset()
    metric.update(*whole)
    assert_same(metric.compute(), after(whole))


def test_ranks_add_up_to_one_batch():
    whole = batch(3, 8, SITES)
    ranks = [DomainSpecialisation(SITES, DOMAINS, permutations=20) for _ in range(2)]
    ranks[0].update(*part(whole, slice(4, 8)))
    ranks[1].update(*part(whole, slice(0, 4)))
    ranks[0].merge_state(ranks[1])  # torchmetrics puts the incoming rows first
    assert_same(ranks[0].compute(), after(whole))


def test_the_mean_over_sites_has_the_null_of_that_mean():
    sites = after(batch(4, 6, SITES))
    mean = mean_over_sites(sites)
    assert mean.information == pytest.approx(fmean(s.information for s in sites.values()))
    assert mean.null[7] == pytest.approx(fmean(s.null[7] for s in sites.values()))
    assert mean.null_std < max(s.null_std for s in sites.values())
    assert set(specialisation_summary(sites)) == {
        f"val/routing/domain_information{suffix}" for suffix in ("", "_null", "_adjusted", "_p")
    }
    assert len(specialisation_rows(sites)) == 3 * len(sites)


def test_padding_alone_gives_nothing_and_no_error():
    assignment, valid, row_ids, domains = batch(0, 2, SITES)
    found = after((assignment, torch.zeros_like(valid), row_ids, domains))
    assert all(site.information == 0 and site.p_value == 1 for site in found.values())
    assert specialisation_summary({}) == {} and specialisation_rows({}) == {}


def test_mistakes_are_named():
    assignment, valid, row_ids, domains = batch(0, 3, SITES)
    metric = DomainSpecialisation(SITES, DOMAINS)
    with pytest.raises(ValueError, match="a site without routing: c"):
        metric.update({"a": assignment["a"], "b": assignment["b"]}, valid, row_ids, domains)
    with pytest.raises(ValueError, match="a has 2 experts; num_experts says 4"):
        metric.update({**assignment, "a": assignment["b"]}, valid, row_ids, domains)
    with pytest.raises(ValueError, match="tokens of several domains"):
        metric.update(assignment, torch.ones_like(valid), row_ids, torch.arange(18).view(3, 6) % 4)
    with pytest.raises(ValueError, match="permutations is 0"):
        DomainSpecialisation(SITES, DOMAINS, permutations=0)
