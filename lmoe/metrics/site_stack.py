"""Sites whose routing has the same shape, taken together: a few tensor operations for all of them, not for each.

Shapes: S sites, N tokens (a batch of B rows times T), E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lmoe.ops.site_groups import sites_of_one_shape


class SiteDecision(Protocol):
    """What metrics read of a site's Routing, each one some of it: (B, T, E) tensors, and (B, T) where experts act."""

    @property
    def router_logits(self) -> Tensor: ...
    @property
    def probs(self) -> Tensor: ...
    @property
    def routing_weights(self) -> Tensor: ...
    @property
    def assignment(self) -> Tensor: ...
    @property
    def acting(self) -> Tensor | None: ...


def flat_tokens(routing: Tensor, sites: Sequence[str], valid: Tensor) -> Tensor:
    """Routing of one site or of several as (S, N, E), without gradient.

    Args:
        routing: (B, T, E) of one site, or (S, B, T, E).
        sites: names of the S sites.
        valid: (B, T) bool, False for padding.

    Raises:
        ValueError: the routing has another number of sites or tokens.
    """
    shape = (len(sites), valid.numel(), routing.shape[-1])
    if routing.numel() != shape[0] * shape[1] * shape[2]:
        raise ValueError(
            f"routing of shape {tuple(routing.shape)} does not fit {shape[0]} sites ({sites[0]}, …) and a mask of "
            f"{tuple(valid.shape)} tokens; it must be (B, T, E) for one site, (S, B, T, E) for several, with the B and "
            "T of the mask"
        )
    return routing.detach().reshape(shape)


def stacked_sites(
    tensors: Mapping[str, Tensor], num_experts: Mapping[str, int], valid: Tensor
) -> Iterator[tuple[list[str], Tensor]]:
    """(names, (S, N, E)) of the sites with the same number of experts.

    Args:
        tensors: (B, T, E) of every site, by site name.
        num_experts: E of every site.
        valid: (B, T) bool, False for padding.

    Raises:
        ValueError: a site is missing or unknown, or has other experts or tokens.
    """
    if differing := sorted(tensors.keys() ^ num_experts.keys()):
        found = "without routing" if differing[0] in num_experts else "that the metric does not know"
        raise ValueError(
            f"a site {found}: {differing[0]} (of {len(differing)}); give the routing of all sites of num_experts"
        )
    for sites in sites_of_one_shape(tensors):
        stacked = flat_tokens(torch.stack([tensors[site] for site in sites]), sites, valid)
        for site in sites:
            if num_experts[site] != stacked.shape[-1]:
                raise ValueError(f"{site} has {stacked.shape[-1]} experts; num_experts says {num_experts[site]}")
        yield sites, stacked


def stacked_masks(acting: Sequence[Tensor | None], counted: Tensor) -> Tensor:
    """(S, N) bool: the tokens of a mask on which experts act, at each site.

    Args:
        acting: of each of the S sites, (B, T) bool as a Routing holds it; None: experts act on all tokens.
        counted: (B, T) bool.
    """
    everywhere = counted.reshape(-1)
    masks = [everywhere if acts is None else everywhere & acts.to(counted.device).reshape(-1) for acts in acting]
    return torch.stack(masks)


def places_of(sites: Sequence[str], index: Mapping[str, int]) -> slice | list[int]:
    """Where sites are in a state of all sites; a slice, which needs no index on the device, if they are neighbours.

    Args:
        sites: names.
        index: place of every site.
    """
    places = [index[site] for site in sites]
    first, last = places[0], places[-1]
    return slice(first, last + 1) if places == list(range(first, last + 1)) else places


def shares_of(sums: list[float]) -> list[float]:
    """Divided by their sum; all 0 where that is 0 (relu: no expert was active for any token)."""
    total = sum(sums)
    return [value / total if total else 0.0 for value in sums]
