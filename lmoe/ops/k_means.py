"""Points put into clusters.

Shapes: N points, D dimensions, K clusters.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import vq
from torch import Tensor

STARTS = 10
"""Of which the one counts that ends with the least inertia: a single one often ends in a poor local minimum."""
MOST_ROUNDS = 300
"""Of Lloyd's algorithm from one start, should it not settle before."""
Array = NDArray[np.float64]


def k_means(points_ND: Tensor, count: int, seed: int) -> Tensor:
    """Centroids c of a small inertia sum_n min_k |x_n - c_k|^2: the best of STARTS runs of Lloyd's algorithm, each from
    a start of k-means++ (Arthur and Vassilvitskii, SODA 2007).

    Scipy's kmeans2 is not used: it goes on for a fixed number of rounds, whether it has settled or not, and leaves a
    cluster without points where it is. Here such a cluster begins anew at the point that is farthest from its centroid.

    Args:
        points_ND: finite numbers.
        count: K.
        seed: of the starts; drawn on the CPU, the same on every machine.

    Returns:
        (K, D) float64, in no particular order.

    Raises:
        ValueError: there are fewer different points than clusters.
    """
    points, random = points_ND.double().numpy(), np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(STARTS):
        centroids = _settled(points, _spread_start(points, count, random))
        inertia = float(np.square(vq(points, centroids)[1]).sum())
        if best is None or inertia < least:
            best, least = centroids, inertia
    assert best is not None
    return torch.from_numpy(best)


def nearest_centroid(points_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64 number of the nearest centroid of each point, and (N,) float32 how far it is; computed in float64."""
    distances = torch.cdist(points_ND.double(), centroids_KD.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = distances.min(dim=1)
    return found.indices, found.values.float()


def _spread_start(points: Array, count: int, random: np.random.Generator) -> Array:
    """(K, D) points: each drawn with a probability in proportion to its squared distance from those before it."""
    chosen = [int(random.integers(len(points)))]
    distances = np.square(points - points[chosen[0]]).sum(1)
    while len(chosen) < count:
        total = distances.sum()
        if not total > 0:
            raise ValueError(f"{len(points)} points, of which only {len(chosen)} are different, for {count} clusters")
        chosen.append(int(random.choice(len(points), p=distances / total)))
        distances = np.minimum(distances, np.square(points - points[chosen[-1]]).sum(1))
    return points[chosen]


def _settled(points: Array, centroids: Array) -> Array:
    """Centroids that are the means of the points nearest to them, reached from others."""
    before = None
    for _ in range(MOST_ROUNDS):
        labels, distances = vq(points, centroids)
        if before is not None and np.array_equal(labels, before):
            break
        member_KN = (labels == np.arange(len(centroids))[:, None]).astype(points.dtype)
        sizes = member_KN.sum(1)
        means = member_KN @ points / np.maximum(sizes, 1)[:, None]
        if len(empty := np.flatnonzero(sizes == 0)):
            means[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
        centroids, before = means, labels
    return centroids
