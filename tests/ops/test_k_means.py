"""K-means: groups that lie apart are found, no cluster stays empty, and a seed says all."""

import pytest
import torch

from lmoe.ops.k_means import _settled, k_means, nearest_centroid


def groups(sizes: tuple[int, ...], apart: float = 20.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around middles that lie apart, and the group of each, in a mixed order."""
    generator = torch.Generator().manual_seed(3)
    middles = apart * torch.randn(len(sizes), 5, generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return middles[labels] + torch.randn(len(labels), 5, generator=generator), labels


@pytest.mark.parametrize("sizes", [(30, 30, 30), (80, 3, 10, 7), (5, 5)])
def test_groups_that_lie_apart_are_the_clusters_and_centroids_their_means(sizes):
    points, labels = groups(sizes)
    centroids = k_means(points, len(sizes), seed=0)
    found, distances = nearest_centroid(points, centroids)
    for label in range(len(sizes)):
        [cluster] = found[labels == label].unique()
        assert torch.equal(found == cluster, labels == label)
        torch.testing.assert_close(centroids[cluster], points[labels == label].double().mean(0))
    torch.testing.assert_close(distances, (points.double() - centroids[found]).norm(dim=1).float())


def test_the_same_seed_gives_the_same_bits():
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(k_means(points, 6, seed=5), k_means(points, 6, seed=5))


def test_as_many_clusters_as_points_have_one_each():
    points, _ = groups((1, 1, 1, 1))
    found, distances = nearest_centroid(points, k_means(points, 4, seed=0))
    assert sorted(found.tolist()) == [0, 1, 2, 3] and float(distances.max()) < 1e-5


def test_more_clusters_than_different_points_are_refused():
    with pytest.raises(ValueError, match="6 points, of which only 2 are different, for 3 clusters"):
        k_means(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(3, 1), 3, seed=0)


def test_a_cluster_that_no_point_is_near_to_begins_anew_at_the_farthest_point():
    points = torch.tensor([[0.0], [1.0], [2.0], [50.0]]).double().numpy()
    far = torch.tensor([[0.0], [9000.0], [-9000.0]]).double().numpy()
    found = torch.from_numpy(_settled(points, far))
    labels, _ = nearest_centroid(torch.from_numpy(points), found)
    assert sorted(labels.bincount(minlength=3).tolist()) == [1, 1, 2]
