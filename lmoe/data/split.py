"""Keep a seeded share of the rows of each domain for validation."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmoe.errors import DataError

OF_JUDGING = "judge:"
"""Parts the random numbers of the one split from those of the other."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Split:
    """Indices of rows, each ascending; disjoint, and all rows together.

    Args:
        train: to train on.
        val: kept for validation.
        judge: kept for judging.
    """

    train: list[int]
    val: list[int]
    judge: list[int]


def split_in_three(domains: Sequence[str], *, val_fraction: float, judge_fraction: float, seed: int) -> Split:
    """Judging rows are split off all rows, and then validation rows off the rest, each by `split_rows`.

    Args:
        domains: the domain of each row.
        val_fraction, judge_fraction: below 1; 0: none are split off.
        seed: of both choices.

    Raises:
        DataError: too few rows.
    """
    rest, judge, val = list(range(len(domains))), [], []
    if judge_fraction:
        rest, judge = split_rows(domains, judge_fraction, seed, purpose=OF_JUDGING)
    if val_fraction:
        train, held_out = split_rows([domains[i] for i in rest], val_fraction, seed)
        rest, val = [rest[i] for i in train], [rest[i] for i in held_out]
    return Split(train=rest, val=val, judge=judge)


def split_rows(
    domains: Sequence[str], val_fraction: float, seed: int, *, purpose: str = ""
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation rows, each ascending, disjoint, and all rows together.

    The validation rows number round(val_fraction * rows), at least one, shared among domains by their sizes (largest
    remainder), and a domain of two rows or more keeps at least one to train on. Which rows of a domain are chosen
    depends on the seed, the domain's name and its number of rows.

    Args:
        domains: the domain of each row.
        val_fraction: above 0 and below 1.
        seed: seed of the choice.
        purpose: of the rows that are kept; "" for validation.

    Raises:
        DataError: fewer than two rows.
    """
    if len(domains) < 2:
        raise DataError(
            f"data.path: {len(domains)} usable row cannot be split into training and validation; "
            "add rows, or set data.val_path"
        )
    by_domain: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        by_domain.setdefault(domain, []).append(index)
    val: list[int] = []
    for domain, count in _shares({name: len(rows) for name, rows in by_domain.items()}, val_fraction).items():
        rows = by_domain[domain]
        order = torch.randperm(len(rows), generator=_generator(seed, purpose + domain))
        val += [rows[int(i)] for i in order[:count]]
    chosen = set(val)
    return [i for i in range(len(domains)) if i not in chosen], sorted(val)


def _shares(sizes: dict[str, int], fraction: float) -> dict[str, int]:
    """Validation rows of each domain. Where every domain has a single row, whole domains go to validation."""
    total = min(max(1, round(fraction * sum(sizes.values()))), sum(sizes.values()) - 1)
    limits = {name: size - 1 for name, size in sizes.items()}
    if not any(limits.values()):
        limits = dict.fromkeys(sizes, 1)
    shares = {name: min(math.floor(fraction * size), limits[name]) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (shares[name] - fraction * sizes[name], name))
    while sum(shares.values()) < total:
        open_domains = [name for name in by_remainder if shares[name] < limits[name]]
        if not open_domains:
            break
        for name in open_domains[: total - sum(shares.values())]:
            shares[name] += 1
    return shares


def _generator(seed: int, domain: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{domain}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def first_of_each(domains: Sequence[int], count: int) -> list[int]:
    """Indices of the first `count` rows of each domain, ascending; 0: of all rows."""
    seen: dict[int, int] = {}
    kept = []
    for index, domain in enumerate(domains):
        seen[domain] = seen.get(domain, 0) + 1
        if count == 0 or seen[domain] <= count:
            kept.append(index)
    return kept
