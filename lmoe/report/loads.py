"""What the loads of a run say: dead experts, averages over sites, and how far routers tell domains apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmoe.vocabulary import DEAD_SHARE

MAX_KINDS = 6
"""With more kinds of site than this, sites are grouped by their number of experts alone."""


@dataclass(slots=True, kw_only=True)
class ExpertLoad:
    """Load of the e-th expert of every site that has one. Shares of assignments."""

    expert: int
    mean: float
    lowest: float
    highest: float
    sites: int
    """Sites that have this expert."""
    dead_sites: int
    """Sites where it is dead."""


def is_dead(share: float, num_experts: int) -> bool:
    """Whether a share of assignments is below DEAD_SHARE of the uniform share 1/E."""
    return share < DEAD_SHARE / num_experts


def expert_loads(site_load: Mapping[str, Sequence[float]]) -> list[ExpertLoad]:
    """Load of each expert averaged over the sites that have it, by expert."""
    result = []
    for expert in range(max((len(loads) for loads in site_load.values()), default=0)):
        having = [loads for loads in site_load.values() if len(loads) > expert]
        shares = [loads[expert] for loads in having]
        result.append(
            ExpertLoad(
                expert=expert,
                mean=sum(shares) / len(shares),
                lowest=min(shares),
                highest=max(shares),
                sites=len(shares),
                dead_sites=sum(is_dead(loads[expert], len(loads)) for loads in having),
            )
        )
    return result


def short_sites(sites: Sequence[str]) -> list[str]:
    """Site names from the list of layers on (`model.layers.3.mlp` -> `layers.3.mlp`); whole where that is ambiguous."""
    short = [_from_layers(site) for site in sites]
    return short if len(set(short)) == len(short) else list(sites)


def _from_layers(site: str) -> str:
    parts = site.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(first_number - 1, 0) :])


def site_kind(site: str) -> str:
    """What is repeated in every layer: `model.layers.3.mlp.gate_proj` -> `gate_proj`."""
    return next((part for part in reversed(site.split(".")) if not part.isdigit()), site)


def layer_of(site: str) -> str:
    """A site's layer: `model.layers.3.mlp.gate_proj` -> `layers.3`; the whole name where it has no number."""
    parts = _from_layers(site).split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else site


def site_ticks(sites: Sequence[str], limit: int) -> list[tuple[float, str]]:
    """Ticks of an axis of sites, `limit` (position, label) at most: each site, or the middle of each layer, or of some
    layers only.

    Site i takes the span from i to i + 1.
    """
    if len(sites) <= limit:
        return [(i + 0.5, label) for i, label in enumerate(short_sites(sites))]
    spans: list[tuple[int, int, str]] = []
    for i, site in enumerate(sites):
        if spans and spans[-1][2] == layer_of(site):
            spans[-1] = (spans[-1][0], i + 1, spans[-1][2])
        else:
            spans.append((i, i + 1, layer_of(site)))
    return [((start + end) / 2, label) for start, end, label in spans[:: math.ceil(len(spans) / limit)]]


def group_sites(site_load: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Title -> sites of one kind and one number of experts: those whose loads may be averaged."""
    by_kind: dict[tuple[str, int], list[str]] = {}
    for site, loads in site_load.items():
        by_kind.setdefault((site_kind(site), len(loads)), []).append(site)
    if len(by_kind) > MAX_KINDS:
        merged: dict[tuple[str, int], list[str]] = {}
        for (_, num_experts), sites in by_kind.items():
            merged.setdefault(("all sites", num_experts), []).extend(sites)
        by_kind = merged
    kinds = [kind for kind, _ in by_kind]
    return {
        (f"{kind}, {num_experts} experts" if kinds.count(kind) > 1 else kind): sites
        for (kind, num_experts), sites in by_kind.items()
    }


def mean_loads(loads: Sequence[Sequence[float]]) -> list[float]:
    """Mean over rows of equal length."""
    return [sum(column) / len(loads) for column in zip(*loads, strict=True)]


def domain_distance(domain_load: Mapping[str, Mapping[str, Sequence[float]]], site: str) -> dict[str, float]:
    """Total variation distance between each domain's load at a site and the mean over domains.

    d = 1/2 * sum_e |load_e(domain) - mean_domains load_e|: the share of a domain's assignments that would have to
    move for the domain to be routed like the average one. 0: the router does not tell it apart.
    """
    rows = {domain: loads[site] for domain, loads in domain_load.items() if site in loads}
    mean = mean_loads(list(rows.values()))
    return {d: 0.5 * sum(abs(a - b) for a, b in zip(row, mean, strict=True)) for d, row in rows.items()}
