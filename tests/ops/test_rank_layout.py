"""Ranks of many experts at several sites: every active one is in exactly one slice, at its place."""

import pytest
import torch

from lmoe.ops.rank_layout import BRIDGED_RANKS, Ranks, runs

RANKS = Ranks(((2, 3), (0, 40), (4, 0), (50, 50), (1, 1)), tuple((float(e), e + 0.5) for e in range(5)))


@pytest.mark.parametrize("bits", range(32))
def test_runs_hold_the_active_experts_and_know_the_expert_site_and_scaling_of_each_rank(bits):
    active = tuple(bool(bits >> e & 1) for e in range(5))
    rows = [(e, s) for e, own in enumerate(RANKS.ranks) for s in range(2) for _ in range(own[s])]
    columns = [[e for e, own in enumerate(RANKS.ranks) for _ in range(own[s])] for s in range(2)]
    seen = []
    for run in runs(RANKS, active):
        inside = rows[run.rows]
        order = torch.arange(len(inside)) if run.order is None else run.order
        sorted_rows = [inside[i] for i in order.tolist()]
        assert sorted_rows == list(zip(run.expert_of.tolist(), run.site_of.tolist(), strict=True))
        assert run.scaling.tolist() == [RANKS.scalings[e][s] for e, s in sorted_rows]
        start = 0
        for site in range(2):
            mine = sorted_rows[start : start + run.widths[site]]
            start += run.widths[site]
            assert {s for _, s in mine} <= {site}
            assert [e for e, _ in mine] == columns[site][run.columns[site]]
        seen += [e for e, _ in inside]
    assert len(seen) == len([e for e, _ in rows if e in set(seen)])
    assert {e for e in range(5) if active[e]} <= set(seen)


def test_small_gaps_are_bridged_and_large_ones_are_not():
    small, large = ((BRIDGED_RANKS,), (BRIDGED_RANKS + 1,))
    for gap, count in ((small, 1), (large, 2)):
        ranks = Ranks(((4,), gap, (4,)), ((1.0,),) * 3)
        assert len(runs(ranks, (True, False, True))) == count
    assert runs(RANKS, (False,) * 5) == []
