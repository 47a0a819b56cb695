"""Which sites can be stacked: a few tensor operations for all of them, not for each."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

ELEMENTS_AT_ONCE, ELEMENTS_ON_CPU = 2**22, 2**18
"""Entries of a stack of sites that are taken together. On a GPU more of them save launches. On a CPU a copy that its
cache holds, of 1 MB in float32, is made in memory that is there; a larger one is paid for page by page."""


def sites_of_one_shape(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the sites, those with equal shapes in one list; in the order of the mapping.

    Args:
        tensors: one of any shape for each site, by site name.
    """
    groups: dict[torch.Size, list[str]] = {}
    for site, tensor in tensors.items():
        groups.setdefault(tensor.shape, []).append(site)
    return list(groups.values())


def sites_together(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of sites with equal shapes, but no more of them than copies of moderate size hold.

    Args:
        tensors: one of any shape for each site, by site name.
    """
    for sites in sites_of_one_shape(tensors):
        first = tensors[sites[0]]
        most = ELEMENTS_ON_CPU if first.device.type == "cpu" else ELEMENTS_AT_ONCE
        count = max(1, most // max(1, first.numel()))
        for start in range(0, len(sites), count):
            yield sites[start : start + count]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(S, ...) of S tensors of one shape; of one alone a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
