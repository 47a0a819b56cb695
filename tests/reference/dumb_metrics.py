"""Routing metrics with Python loops over tokens, rows and experts, so that nobody can doubt them.

N tokens, E experts, D in, O out, R rank.
"""

import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor


def entropy(shares: Sequence[float]) -> float:
    """-sum p ln p in nats."""
    return -sum(p * math.log(p) for p in shares if p > 0)


def information(p_NE: Sequence[Sequence[float]]) -> float:
    """(H(mean_t p_t) - mean_t H(p_t)) / ln E."""
    tokens, experts = len(p_NE), len(p_NE[0])
    mean = [sum(row[e] for row in p_NE) / tokens for e in range(experts)]
    return (entropy(mean) - sum(entropy(row) for row in p_NE) / tokens) / math.log(experts)


def importance(w_NE: Sequence[Sequence[float]]) -> list[float]:
    """Share of the summed routing weights of each expert."""
    sums = [sum(row[e] for row in w_NE) for e in range(len(w_NE[0]))]
    return [value / sum(sums) for value in sums]


def mutual_information(domains: Sequence[int], a_NE: Sequence[Sequence[float]]) -> float:
    """sum_{d,e} p(d,e) ln (p(d,e) / (p(d) p(e))) in nats; each token has the weight 1."""
    tokens, experts, names = len(domains), range(len(a_NE[0])), sorted(set(domains))
    total = 0.0
    for d in names:
        p_d = sum(domain == d for domain in domains) / tokens
        for e in experts:
            p_e = sum(row[e] for row in a_NE) / tokens
            p_de = sum(row[e] for domain, row in zip(domains, a_NE, strict=True) if domain == d) / tokens
            if p_de > 0:
                total += p_de * math.log(p_de / (p_d * p_e))
    return total


def chance_information(first: Sequence[int], second: Sequence[int]) -> float:
    """Mean mutual information over all orders of one of two groupings, which keep the sizes of all groups."""
    orders = list(permutations(second))
    ones = [[[float(group == g) for g in sorted(set(second))] for group in order] for order in orders]
    return sum(mutual_information(first, one) for one in ones) / len(orders)


def coactivation(chosen: Sequence[set[int]], experts: int) -> tuple[list[list[float]], list[list[float]]]:
    """(share of tokens that use both i and j, share of the tokens of i that use j)."""
    both = [[sum(i in c and j in c for c in chosen) for j in range(experts)] for i in range(experts)]
    share = [[count / len(chosen) for count in row] for row in both]
    conditional = [[both[i][j] / both[i][i] if both[i][i] else 0.0 for j in range(experts)] for i in range(experts)]
    return share, conditional


def saturation(earlier: Sequence[set[int]], later: Sequence[set[int]]) -> float:
    """Mean over tokens of the share of the later choice that was chosen earlier."""
    shares = [len(now & then) / len(now) for then, now in zip(earlier, later, strict=True) if now]
    return sum(shares) / len(shares)


def dense_inner_products(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """<B_i A_i, B_j A_j>_F from the dense deltas; lora_A of shape (1, R, D) is shared."""
    experts = lora_B.shape[0]
    deltas = [lora_B[e] @ lora_A[e if lora_A.shape[0] > 1 else 0] for e in range(experts)]
    return torch.stack([torch.stack([(one * other).sum() for other in deltas]) for one in deltas])


def dense_cosine(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The same over the norms; deltas must not be 0."""
    products = dense_inner_products(lora_A, lora_B)
    norms = torch.stack([products[e, e].sqrt() for e in range(products.shape[0])])
    return torch.stack([products[i] / (norms[i] * norms) for i in range(products.shape[0])])


def target_choices(
    logits: Tensor, row_of_token: Sequence[int], target_of_row: Sequence[int], targets: int
) -> tuple[list[list[float]], float]:
    """(rows of each target by chosen target, mean loss of the rows), of rows that all have a target.

    Args:
        logits: (N, E) of valid tokens; expert e belongs to target e mod C.
    """
    chosen, losses = [[0.0] * targets for _ in range(targets)], []
    for row, target in enumerate(target_of_row):
        tokens = [logits[n] for n in range(len(logits)) if row_of_token[n] == row]
        row_loss = 0.0
        for z in tokens:
            p = [math.exp(float(value)) for value in z]
            of_target = [sum(p[e] for e in range(len(p)) if e % targets == c) / sum(p) for c in range(targets)]
            chosen[target][of_target.index(max(of_target))] += 1 / len(tokens)
            row_loss -= math.log(of_target[target])
        losses.append(row_loss / len(tokens))
    return chosen, sum(losses) / len(losses)


def assignment_shares(a_NE: Sequence[Sequence[float]]) -> list[float] | None:
    """Share of all assignments of some tokens that each expert got; None: no token has an expert."""
    experts = len(a_NE[0]) if len(a_NE) else 0
    sums = [sum(float(row[e]) for row in a_NE) for e in range(experts)]
    return [value / sum(sums) for value in sums] if sum(sums) > 0 else None


def pair_overlap(pairs: Sequence[tuple[Sequence, Sequence]]) -> float | None:
    """Mean over pairs of sum_e min(f_e, g_e), of answers given as lists of their tokens' assignments."""
    overlaps = []
    for one, other in pairs:
        f, g = assignment_shares(one), assignment_shares(other)
        if f is not None and g is not None:
            overlaps.append(sum(min(f[e], g[e]) for e in range(len(f))))
    return sum(overlaps) / len(overlaps) if overlaps else None


def changed_sets(earlier: Sequence[set[int]], later: Sequence[set[int]]) -> float:
    """Share of tokens whose set is another one."""
    return sum(then != now for then, now in zip(earlier, later, strict=True)) / len(later)


def mean_divergence(p_NE: Sequence[Sequence[float]], q_NE: Sequence[Sequence[float]], least: float) -> float:
    """Mean over tokens of sum_e p_e ln(p_e / q_e), each probability at least `least`, p and q made to sum to 1."""
    total = 0.0
    for p_E, q_E in zip(p_NE, q_NE, strict=True):
        p, q = [max(float(value), least) for value in p_E], [max(float(value), least) for value in q_E]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / len(p_NE)
