"""How often each training row comes in an epoch where sources or domains are mixed in given parts.

Every row comes at least once, and those of a group that is to weigh more come again, as with "all_exhausted" of
`datasets.interleave_datasets`. So the mixture is a list of row numbers, and order, packing and resuming know nothing of
it.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe.errors import DataError

MOST_TIMES = 100
"""An epoch may be as many times the rows long."""


def domain_shares(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares of groups of given sizes: size^(1/temperature), normalised (Conneau 2020, 1911.02116, 3.1: alpha is
    1/temperature).

    Args:
        sizes: rows of each group, 0 for none.
        temperature: 1 leaves them as they are, infinite makes them equal.
    """
    return _parts([size / max(sizes) for size in sizes], 1 / temperature)


def weight_shares(weights: Sequence[float]) -> list[float]:
    """Shares of sources of given weights, of which one is above 0."""
    return _parts([weight / max(weights) or weight for weight in weights])


def _parts(ratios: Sequence[float], power: float = 1.0) -> list[float]:
    """Powers of ratios, as parts of their sum. None above 0 becomes 0, for then its group would be left out without a
    word; `mixed` refuses what is so uneven."""
    powers = [max(ratio**power, sys.float_info.min) if ratio > 0 else 0.0 for ratio in ratios]
    return [one / sum(powers) for one in powers]


def mixed(groups: Tensor, shares: Sequence[float], seed: int) -> Tensor:
    """Row numbers of one epoch, (M,) int64, rows of a group in a row; each row of a group with a share comes.

    Args:
        groups: (N,) int64, group of each row.
        shares: of each group, which sum to 1; a group of share 0 is left out.
        seed: chooses the rows that come once more than others.

    Raises:
        DataError: no row is of a group with a share, or the epoch would be far longer than the rows.
    """
    sizes = torch.bincount(groups, minlength=len(shares)).tolist()
    there = [(size, share) for size, share in zip(sizes, shares, strict=True) if size and share > 0]
    if not there:
        raise DataError(
            "no rows to train on: data.sources.<name>.weight is 0 for every source that they are from; give one of "
            "them a weight above 0, or name other data.domains"
        )
    total = sum(share for _, share in there)
    length = max(size * total / share for size, share in there)
    if length > MOST_TIMES * len(groups):
        raise DataError(
            f"the weights, or data.temperature, make an epoch of {length:,.0f} rows of {len(groups):,} rows; at "
            f"most {MOST_TIMES} times as many are allowed: give large sources or domains more, or small ones less"
        )
    by_group = groups.argsort(stable=True).split(torch.bincount(groups, minlength=len(shares)).tolist())
    chosen = []
    for group, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if not size or share <= 0:
            continue
        rows = by_group[group]
        times, more = divmod(round(length * share / total), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + group))
        chosen += [rows] * times + [rows[order[:more].sort().values]]
    return torch.cat(chosen)
