"""What one label tells about another, and how much of it chance alone would show.

Shapes: M domains, E experts, R rows, P permutations; `...` any leading dimensions.
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
    per_chunk = max(1, CHUNK_ELEMENTS // max(1, rows * num_domains))
    found = []
    for start in range(0, permutations, per_chunk):
        count = min(per_chunk, permutations - start)
        order_PR = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])
        labels_PR = row_domains[order_PR.to(row_domains.device)]
        is_domain_PMR = (labels_PR[:, None, :] == torch.arange(num_domains, device=labels_PR.device)[:, None]).double()
        joint = torch.matmul(is_domain_PMR, loads_RC).unflatten(-1, row_loads.shape[1:])
        found.append(mutual_information(joint.movedim(1, -2)))
    return torch.cat(found)
