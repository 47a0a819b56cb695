"""Rows whose tokens are kept with their routing: which they are, and what is kept of each."""

import pytest
import torch

from lmoe.layers.routing import Routing
from lmoe.objectives.preference import KEYS
from lmoe.training.sample_rows import MOST_ROWS, MOST_TOKENS, SampleRows, rows_to_keep


def routing_of(weights: torch.Tensor, acting: torch.Tensor | None = None) -> Routing:
    return Routing(weights, weights, weights, (weights > 0).float(), acting=acting)


def batch_of(lengths: list[int], domains: list[int]) -> dict[str, torch.Tensor]:
    T = max(lengths)
    valid = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    ids = torch.arange(len(lengths) * T).reshape(len(lengths), T)
    return {"input_ids": ids, "valid_mask": valid, "domain_ids": torch.tensor(domains)[:, None] * valid}


@pytest.mark.parametrize("domains", [1, 2, 8, 12, 40])
def test_at_most_sixteen_rows_are_kept_evenly_of_each_domain(domains: int) -> None:
    rows = torch.arange(domains).repeat(30)
    wanted = rows_to_keep(rows)
    assert len(wanted) == min(domains, MOST_ROWS) and sum(map(len, wanted.values())) <= MOST_ROWS
    assert {len(numbers) for numbers in wanted.values()} == {max(1, min(4, 16 // domains))}
    assert wanted[0] == {1: [3, 11, 18, 26], 2: [3, 11, 18, 26], 8: [7, 22]}.get(domains, [15])


def test_domains_without_rows_and_with_few_have_no_more_than_they_have() -> None:
    assert rows_to_keep(torch.tensor([2, 2, 0])) == {0: [0], 2: [0, 1]}
    assert rows_to_keep(torch.tensor([], dtype=torch.long)) == {}


def test_a_row_is_kept_with_its_heaviest_expert_at_each_site_and_the_mean_over_sites() -> None:
    torch.manual_seed(0)
    batch = batch_of([3, 5], [0, 1])
    weights = {"a": torch.rand(2, 5, 4), "b": torch.rand(10, 3)}  # the second of a backbone that flattens its tokens
    weights["b"][5] = 0  # an expert acts nowhere on the first token of the second row
    found = SampleRows({1: [0]}, {"a": 4, "b": 3})
    found.update({name: routing_of(tensor) for name, tensor in weights.items()}, batch)
    [row] = found.rows
    assert (row.domain, row.number, row.of_pair, row.cut, row.ids) == (1, 0, "", 0, [5, 6, 7, 8, 9])
    shares = [weights["a"][1] / weights["a"][1].sum(-1, keepdim=True), weights["b"].reshape(2, 5, 3)[1].clone()]
    shares[1] = torch.nan_to_num(shares[1] / shares[1].sum(-1, keepdim=True))
    for site, share in enumerate(shares):
        assert row.weight[:, site].tolist() == (share.max(-1).values * 255).round().int().tolist()
        there = row.weight[:, site] > 0
        assert row.expert[there, site].tolist() == share.argmax(-1)[torch.from_numpy(there)].tolist()
    assert row.weight[0, 1] == 0
    mean = (shares[0] + torch.nn.functional.pad(shares[1], (0, 1))) / 2
    assert row.mean.tolist() == (mean * 255).round().int().tolist()


def test_tokens_on_which_no_expert_acts_have_none() -> None:
    batch, acting = batch_of([4], [0]), torch.tensor([[False, False, True, True]])
    found = SampleRows({0: [0]}, {"model": 2})
    found.update({"model": routing_of(torch.full((1, 4, 2), 0.5), acting)}, batch)
    assert found.rows[0].weight[:, 0].tolist() == [0, 0, 128, 128]


def test_of_a_pair_both_answers_are_kept_and_rows_are_counted_by_pairs() -> None:
    found = SampleRows({0: [1], 1: [0]}, {"a": 2})
    for domains in ([0, 1], [0, 0]):
        batch = batch_of([3, 4, 5, 6], domains * 2) | {KEYS: torch.zeros(2)}
        found.update({"a": routing_of(torch.rand(4, 6, 2))}, batch)
    assert [(row.domain, row.number, row.of_pair, len(row.ids)) for row in found.rows] == [
        *((1, 0, "chosen", 4), (1, 0, "rejected", 6)),
        *((0, 1, "chosen", 3), (0, 1, "rejected", 5)),
    ]


def test_long_rows_are_cut_and_with_many_sites_sooner() -> None:
    batch = batch_of([1000], [0])
    few, many = SampleRows({0: [0]}, {"a": 2}), SampleRows({d: [0] for d in range(16)}, {f"{n}": 2 for n in range(90)})
    few.update({"a": routing_of(torch.rand(1, 1000, 2))}, batch)
    assert len(few.rows[0].ids) == MOST_TOKENS and few.rows[0].cut == 1000 - MOST_TOKENS
    assert many.most_tokens == 76
