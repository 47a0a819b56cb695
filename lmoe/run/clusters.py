"""Clusters of prompts, by k-means on what the bare base makes of them: targets of routers where domains are not.

Shapes: K clusters, D hidden, N rows, M different prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmoe.backbones.mean_states import in_order
from lmoe.data.encoded import EncodedRows, opening, row_digest
from lmoe.errors import ConfigError
from lmoe.ops.deviations import deviations
from lmoe.ops.k_means import k_means, nearest_centroid
from lmoe.rules.routers import WITHOUT_TARGETS

FIT_PROMPTS = 4096
"""Different prompts of the training rows, a seeded choice, that the centroids are fitted on at most; the others get the
nearest centroid. Some hundreds of prompts for each cluster move a centroid little; their states must fit in memory."""
ReadStates = Callable[[Sequence[Tensor]], Iterator[tuple[list[int], Tensor]]]
"""From token ids of prompts to batches of their numbers and states; see `states_in_batches`."""


@dataclass(slots=True, frozen=True)
class RowPrompts:
    """The prompts of rows.

    Args:
        digests: (N,) int64 of each row's prompt.
        different: token ids of each different prompt, by digest, in the order of the rows.
    """

    digests: Tensor
    different: dict[int, Tensor]

    @classmethod
    def of(cls, rows: EncodedRows) -> RowPrompts:
        """The tokens before the first label of each row; of a plain text its head."""
        digests, different = [], {}
        for row in rows:
            prompt = row.input_ids[: opening(row)]
            digests.append(row_digest(prompt.numpy()))
            different.setdefault(digests[-1], prompt)
        return cls(torch.tensor(digests, dtype=torch.long), different)


@dataclass(slots=True, frozen=True, kw_only=True)
class PromptClusters:
    """Centroids, and the cluster of every prompt that was put into one.

    Args:
        centroids: (K, D) float32, of standardised states.
        mean, std: (D,) float32 of the states that were fitted on. Standardised, each dimension counts alike: a few
            dimensions of hidden states are many times as large as the others, and would decide alone.
        digests: (M,) int64 of the prompts.
        clusters: (M,) int64.
        distances: (M,) float32, from the centroid.
    """

    centroids: Tensor
    mean: Tensor
    std: Tensor
    digests: Tensor
    clusters: Tensor
    distances: Tensor

    @classmethod
    def fitted(cls, prompts: RowPrompts, count: int, seed: int, read: ReadStates) -> PromptClusters:
        """Put the prompts of the training rows into clusters, numbered by falling number of rows.

        Args:
            prompts: of the training rows.
            count: K.
            seed: of the choice of prompts and of k-means.
            read: states of prompts.

        Raises:
            ConfigError: fewer different prompts than clusters, or states that are no numbers.
        """
        digests = list(prompts.different)
        _check_count(len(digests), count)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(digests), generator=generator)[:FIT_PROMPTS].sort().values.tolist()
        states = in_order(read([prompts.different[digests[number]] for number in chosen]))
        check_states(states)
        mean, std = states.mean(0), deviations(states)
        try:
            centroids = k_means((states - mean) / std, count, seed).float()
        except ValueError as error:
            raise ConfigError(
                f"the base makes the same of too many prompts: {error}; lower data.clusters, or use {WITHOUT_TARGETS}"
            ) from None
        nothing = torch.empty(0, dtype=torch.long)
        none = cls(centroids=centroids, mean=mean, std=std, digests=nothing, clusters=nothing, distances=torch.empty(0))
        found = none.with_more([digests[number] for number in chosen], *none.nearest(states))
        return found.with_prompts(prompts, read).by_size(prompts)

    def nearest(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) the cluster of each of (N, D) states, and (N,) how far its centroid is."""
        return nearest_centroid((states - self.mean) / self.std, self.centroids)

    def of(self, prompts: RowPrompts) -> Tensor:
        """(N,) int64 the cluster of each row."""
        known = dict(zip(self.digests.tolist(), self.clusters.tolist(), strict=True))
        return torch.tensor([known[digest] for digest in prompts.digests.tolist()], dtype=torch.long)

    def unknown(self, prompts: RowPrompts) -> list[int]:
        """Digests of the prompts that were put into no cluster yet."""
        known = set(self.digests.tolist())
        return [digest for digest in prompts.different if digest not in known]

    def with_prompts(self, prompts: RowPrompts, read: ReadStates) -> PromptClusters:
        """The same clusters, with all of these prompts in the nearest one.

        Raises:
            ConfigError: states that are no numbers.
        """
        if not (new := self.unknown(prompts)):
            return self
        clusters, distances = torch.zeros(len(new), dtype=torch.long), torch.zeros(len(new))
        for numbers, states in read([prompts.different[digest] for digest in new]):
            check_states(states)
            clusters[numbers], distances[numbers] = self.nearest(states)
        return self.with_more(new, clusters, distances)

    def with_more(self, digests: Sequence[int], clusters: Tensor, distances: Tensor) -> PromptClusters:
        """The same clusters, with more prompts in them."""
        return replace(
            self,
            digests=torch.cat([self.digests, torch.tensor(digests, dtype=torch.long)]),
            clusters=torch.cat([self.clusters, clusters]),
            distances=torch.cat([self.distances, distances]),
        )

    def by_size(self, prompts: RowPrompts) -> PromptClusters:
        """The same clusters, numbered by falling number of rows."""
        sizes = torch.bincount(self.of(prompts), minlength=len(self.centroids))
        order = sizes.argsort(descending=True, stable=True)
        return replace(self, centroids=self.centroids[order], clusters=order.argsort()[self.clusters])


def check_prompts(rows: EncodedRows, count: int) -> None:
    """Refuse rows that cannot be put into so many clusters, whatever the base makes of them.

    Raises:
        ConfigError: fewer different prompts than clusters.
    """
    found: set[int] = set()
    for row in rows:
        found.add(row_digest(row.input_ids[: opening(row)].numpy()))
        if len(found) == count:
            return
    _check_count(len(found), count)


def _check_count(different: int, count: int) -> None:
    if different < count:
        prompts = "prompt" if different == 1 else "different prompts"
        raise ConfigError(
            f"the training rows have {different} {prompts}, which cannot be put into {count} clusters; lower "
            f"data.clusters (null: injection.num_experts), add rows, or use {WITHOUT_TARGETS}"
        )


def check_states(states: Tensor) -> None:
    """Refuse states of which no mean can be taken.

    Raises:
        ConfigError: NaN or infinity among them.
    """
    if not bool(states.isfinite().all()):
        raise ConfigError(
            "moe.router_target=cluster: hidden states of the base hold NaN or infinity; use "
            "backbone.precision=bfloat16 or float32, or moe.router_target=domain"
        )
