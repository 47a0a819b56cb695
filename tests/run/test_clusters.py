"""Clusters of prompts by themselves: numbered by size, the same for one seed, the nearest one for later prompts."""

import pytest
import torch
from torch import Tensor

from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.errors import ConfigError
from lmoe.run import clusters as module
from lmoe.run.clusters import PromptClusters, RowPrompts

KINDS = ((40, 3), (60, 9), (80, 5))
"""First token of a kind of prompts, and how many rows have it."""


def rows_of(kinds=KINDS, *, first: int = 0) -> EncodedRows:
    """Rows of three tokens, the last of which is the answer; prompts of a kind begin alike."""
    rows = []
    for index, (token, count) in enumerate(kinds):
        for number in range(count):
            ids = torch.tensor([token, first + number, 1], dtype=torch.int32)
            rows.append(EncodedRow(ids, torch.tensor([False, False, True]), index))
    return EncodedRows.of(rows)


def read(prompts):
    """States that lie near one another where the first token is the same, in batches of two, the last prompts first."""
    for start in range(len(prompts) - 1, -1, -2):
        numbers = [number for number in (start, start - 1) if number >= 0]
        yield numbers, torch.stack([state(prompts[number]) for number in numbers])


def state(prompt: Tensor) -> Tensor:
    token, number = prompt.tolist()
    # The second dimension is large and says nothing, as a few of hidden states do.
    return torch.tensor([token / 10, 1000.0 * ((7 * number + token) % 5), token % 7])


def test_rows_of_like_prompts_are_a_cluster_and_the_largest_is_the_first():
    rows = rows_of(((40, 3), (60, 9)))
    prompts = RowPrompts.of(rows)
    found = PromptClusters.fitted(prompts, 2, 0, lambda some: ((n, s[:, [0, 2]]) for n, s in read(some)))
    assert found.of(prompts).tolist() == [1] * 3 + [0] * 9
    assert [int((found.clusters == number).sum()) for number in (0, 1)] == [9, 3]


def test_dimensions_count_alike_whatever_their_size():
    """Two dimensions tell the kinds apart, and a third, a thousand times as large, says nothing of them."""
    prompts = RowPrompts.of(rows_of())
    found = PromptClusters.fitted(prompts, 3, 0, read)
    assert found.of(prompts).tolist() == [2] * 3 + [0] * 9 + [1] * 5


def test_the_same_seed_gives_the_same_clusters_bit_by_bit():
    first, again = (PromptClusters.fitted(RowPrompts.of(rows_of()), 3, 4, read) for _ in range(2))
    assert all(
        torch.equal(getattr(first, name), getattr(again, name)) for name in ("centroids", "clusters", "distances")
    )


def test_equal_prompts_are_read_once_and_count_as_rows():
    rows = rows_of(((40, 2), (60, 1)))
    many = rows.subset([2, 2, 2, 2, 0, 1])
    prompts, asked = RowPrompts.of(many), []

    def counting(some):
        asked.append(len(some))
        return read(some)

    found = PromptClusters.fitted(prompts, 3, 0, counting)
    assert asked == [3]
    assert found.of(prompts).tolist()[:4] == [0] * 4


def test_prompts_that_come_later_get_the_nearest_centroid_and_the_others_stay():
    prompts, later = RowPrompts.of(rows_of()), RowPrompts.of(rows_of(first=50))
    found = PromptClusters.fitted(prompts, 3, 0, read)
    assert found.unknown(later) == list(later.different)
    more = found.with_prompts(later, read)
    assert torch.equal(more.of(prompts), found.of(prompts)) and not more.unknown(later)
    columns = [values.tolist() for values in (more.digests, more.clusters, more.distances)]
    for digest, cluster, distance in zip(*columns, strict=True):
        prompt = {**prompts.different, **later.different}[digest]
        apart = (((state(prompt) - found.mean) / found.std - found.centroids).double() ** 2).sum(1).sqrt()
        assert (cluster, distance) == (int(apart.argmin()), pytest.approx(float(apart.min()), rel=1e-5))
    assert more.with_prompts(later, lambda some: pytest.fail("read again")) is more


def test_few_of_many_prompts_are_fitted_on_and_all_are_assigned(monkeypatch):
    monkeypatch.setattr(module, "FIT_PROMPTS", 8)
    prompts, asked = RowPrompts.of(rows_of()), []

    def counting(some):
        asked.append(len(some))
        return read(some)

    found = PromptClusters.fitted(prompts, 2, 0, counting)
    assert asked == [8, len(prompts.different) - 8]
    assert len(found.of(prompts)) == sum(count for _, count in KINDS)


def test_fewer_different_prompts_than_clusters_are_refused():
    rows = rows_of(((40, 2),))
    prompts = RowPrompts.of(rows.subset([0, 0, 0, 1]))
    with pytest.raises(ConfigError, match="2 different prompts, which cannot be put into 3 clusters; lower"):
        PromptClusters.fitted(prompts, 3, 0, read)


def test_prompts_of_which_the_base_makes_the_same_are_refused():
    with pytest.raises(ConfigError, match="the base makes the same of too many prompts"):
        PromptClusters.fitted(RowPrompts.of(rows_of()), 3, 0, lambda some: ((n, s * 0) for n, s in read(some)))


def test_states_that_are_no_numbers_are_refused():
    with pytest.raises(ConfigError, match="hidden states of the base hold NaN or infinity"):
        PromptClusters.fitted(RowPrompts.of(rows_of()), 3, 0, lambda some: ((n, s / 0) for n, s in read(some)))
