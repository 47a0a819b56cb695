"""What one label tells about another, and how much of it chance alone would show.

Shapes: M domains, E experts, R rows, P permutations, N items; `...` any leading dimensions.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Elements of the largest one-hot tensor of permuted labels, 32 MB in float64."""


def mutual_information(joint: Tensor) -> Tensor:
    """I(D; E) = sum_{d,e} p(d,e) ln (p(d,e) / (p(d) p(e))), computed as H(D) + H(E) - H(D,E).

    0 where the two are independent, or where there is no weight at all; H(D) where the expert tells the domain. The
    statistic that Mod-Squad (2212.08066) maximises for tasks and experts.

    Args:
        joint: (..., M, E) weights from 0, such as the load of each expert in each domain; scaled to sum to 1 here.

    Returns:
        (...) nats, float64.
    """
    p_ME = joint.double()
    p_ME = p_ME / p_ME.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    information = entropy(p_ME.sum(-1)) + entropy(p_ME.sum(-2)) - entropy(p_ME.flatten(-2))
    return information.clamp(min=0)


def entropy(shares: Tensor) -> Tensor:
    """H = -sum_m p_m ln p_m in nats, with 0 ln 0 = 0.

    Args:
        shares: (..., M), sums to 1.

    Returns:
        (...).
    """
    return torch.special.entr(shares).sum(-1)


def permuted_information(
    row_loads: Tensor, row_domains: Tensor, num_domains: int, permutations: int, seed: int
) -> Tensor:
    """I(D; E) with the domains permuted among the rows: what it would be if domains did not matter.

    Tokens of one row are alike for reasons that have nothing to do with the domain (the same topic, the same words),
    so tokens are not exchangeable and rows are: whole rows exchange their domains, each keeps its length and its loads
    (whole-block exchangeability; Winkler et al., NeuroImage 123, 253, 2015). Permuting tokens instead would find a
    specialisation in routers that have none.

    Args:
        row_loads: (R, ..., E) load of each expert in each row, e.g. (R, S, E) for S sites.
        row_domains: (R,) int64 domain of each row.
        num_domains: M.
        permutations: P. The same ones for every site, so that means over sites have a null distribution too.
        seed: of the permutations, drawn on the CPU: the same on every device.

    Returns:
        (P, ...) nats, float64.
    """
    rows = len(row_domains)
    generator = torch.Generator().manual_seed(seed)
    loads_RC = row_loads.double().flatten(1)
    row_R = torch.arange(rows, device=row_domains.device)
    per_chunk = max(1, CHUNK_ELEMENTS // max(1, rows, num_domains * loads_RC.shape[1]))
    found = []
    for start in range(0, permutations, per_chunk):
        count = min(per_chunk, permutations - start)
        order_PR = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])
        labels_PR = row_domains[order_PR.to(row_domains.device)]
        # NOTE sparse: each row is of one domain, and a dense product would take as many times the work as there are.
        first_P1 = num_domains * torch.arange(count, device=row_R.device)[:, None]
        places = torch.stack([(first_P1 + labels_PR).flatten(), row_R.repeat(count)])
        ones = torch.ones(count * rows, dtype=torch.float64, device=row_R.device)
        is_domain = torch.sparse_coo_tensor(places, ones, (count * num_domains, rows), check_invariants=False)
        joint = torch.sparse.mm(is_domain, loads_RC).unflatten(0, (count, -1)).unflatten(-1, row_loads.shape[1:])
        found.append(mutual_information(joint.movedim(1, -2)))
    return torch.cat(found)


def adjusted_mutual_information(joint: Tensor) -> float:
    """(I - E[I]) / ((H(D) + H(E)) / 2 - E[I]): how well two groupings of the same items agree, beyond chance.

    1 where they are the same but for the names of the groups, 0 on average where they have nothing to do with each
    other, whatever the number of groups; a little below 0 is possible. E[I] is that of the hypergeometric model: the
    items exchange their groups at random and the groups keep their sizes. AMI_sum of Vinh, Epps and Bailey (JMLR 11,
    2837, 2010), the arithmetic mean that scikit-learn takes too. Both groupings into one group each: 1.

    Args:
        joint: (M, E) counts of items, whole numbers from 0.

    Raises:
        ValueError: something else than counts.
    """
    counts = joint.double()
    if counts.dim() != 2 or not bool(((counts >= 0) & (counts == counts.round())).all()):
        raise ValueError(
            f"a table of counts is needed, whole numbers from 0; got {joint.dtype} of {tuple(joint.shape)}"
        )
    a_M, b_E = (sums[sums > 0] for sums in (counts.sum(1), counts.sum(0)))
    if len(a_M) == len(b_E) <= 1:
        return 1.0
    items = float(counts.sum())
    expected = expected_mutual_information(a_M, b_E)
    mean_entropy = float(entropy(a_M / items) + entropy(b_E / items)) / 2
    if len(a_M) == len(b_E) == items:
        return 1.0  # where each item is a group of its own, chance shows the same
    return (float(mutual_information(counts)) - expected) / (mean_entropy - expected)


def groups(joint: Tensor) -> int:
    """How many rows of an (M, E) table hold something."""
    return int(joint.any(-1).sum())


def expected_mutual_information(a_M: Tensor, b_E: Tensor) -> float:
    """E[I] = sum_{m,e} sum_n n/N ln(N n / (a_m b_e)) P(n), P the hypergeometric probability of n common items.

    Equation 24a of Vinh, Epps and Bailey (JMLR 11, 2837, 2010), n from max(1, a_m + b_e - N) to min(a_m, b_e).

    Args:
        a_M: items of each group of one grouping, above 0.
        b_E: items of each group of the other; sums to the same N.

    Returns:
        Nats.
    """
    items, total = a_M.double().sum(), 0.0
    log_factorial = torch.special.gammaln(torch.arange(int(items) + 1, dtype=torch.float64) + 1)
    for a, times_a in _counted(a_M):
        for b, times_b in _counted(b_E):
            n = torch.arange(max(1, a + b - int(items)), min(a, b) + 1)
            apart = log_factorial[a - n] + log_factorial[b - n] + log_factorial[int(items) - a - b + n]
            ways = log_factorial[a] + log_factorial[b] + log_factorial[int(items) - a] + log_factorial[int(items) - b]
            log_p = ways - log_factorial[-1] - log_factorial[n] - apart
            total += times_a * times_b * float((n / items * (items * n / (a * b)).log() * log_p.exp()).sum())
    return total


def _counted(sizes: Tensor) -> list[tuple[int, int]]:
    """Sizes of groups, each once with how often it is there: of N items at most sqrt(2 N) sizes differ."""
    values, times = sizes.long().unique(return_counts=True)
    return list(zip(values.tolist(), times.tolist(), strict=True))
