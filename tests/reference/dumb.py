"""The mathematics of DESIGN.md 4 with Python loops over tokens and experts, so that nobody can doubt it.

Nothing here is stacked, scattered or masked by multiplication; torch only multiplies, adds and differentiates.

N tokens, E experts, D in, O out, R rank.
"""

import math

import torch
from torch import Tensor


def gate(z: Tensor, *, top_k: int, temperature: float, renormalise: bool) -> tuple[list[Tensor], list[Tensor], set]:
    """(probabilities, weights, chosen experts) of one token from its E logits; soft routing is top_k = E."""
    powers = [torch.exp(value / temperature) for value in z]
    probs = [power / sum(powers) for power in powers]
    by_size = sorted(range(len(probs)), key=lambda e: -float(probs[e].detach()))
    chosen = set(by_size[:top_k])
    total = sum(probs[e] for e in chosen) if renormalise else 1.0
    weights = [probs[e] / total if e in chosen else torch.zeros_like(probs[e]) for e in range(len(probs))]
    return probs, weights, chosen


def mixture(
    x_ND: Tensor,
    base_OD: Tensor,
    router_ED: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    top_k: int,
    temperature: float,
    renormalise: bool,
) -> Tensor:
    """(N, O): W x + scaling * sum_e w_e B_e A_e x, token by token and expert by expert."""
    rows = []
    for x in x_ND:
        y = base_OD @ x
        z = torch.stack([row @ x for row in router_ED])
        _, weights, chosen = gate(z, top_k=top_k, temperature=temperature, renormalise=renormalise)
        for e in sorted(chosen):
            y = y + scaling * weights[e] * (lora_B[e] @ (lora_A[e] @ x))
        rows.append(y)
    return torch.stack(rows)


def load_balancing_loss(z_NE: Tensor, valid: list[bool], *, top_k: int, soft: bool) -> Tensor:
    """E * sum_e f_e P_e of one site; f counts choices, or takes probabilities without gradient where soft."""
    experts = z_NE.shape[1]
    f, p = [0.0] * experts, [torch.zeros((), dtype=z_NE.dtype)] * experts
    for t in range(z_NE.shape[0]):
        if not valid[t]:
            continue
        probs, _, chosen = gate(z_NE[t], top_k=top_k, temperature=1.0, renormalise=False)
        for e in range(experts):
            f[e] += float(probs[e].detach()) if soft else (e in chosen) / top_k
            p[e] = p[e] + probs[e]
    tokens = sum(valid)
    return experts * sum((f[e] / tokens) * (p[e] / tokens) for e in range(experts))


def router_z_loss(z_NE: Tensor, valid: list[bool]) -> Tensor:
    """Mean over valid tokens of (log sum_e exp z_e)^2."""
    terms = [torch.log(sum(torch.exp(v) for v in z_NE[t])) ** 2 for t in range(z_NE.shape[0]) if valid[t]]
    return sum(terms) / len(terms)


def statistics(p_NE: list[list[float]], w_NE: list[list[float]], chosen: list[set[int]]) -> dict[str, object]:
    """Load, entropy, effective number, CV, MaxVio and dead experts of one site from plain numbers."""
    experts, tokens = len(p_NE[0]), len(p_NE)
    load = [sum((e in c) / len(c) for c in chosen) / tokens for e in range(experts)]
    entropy = sum(-sum(p * math.log(p) for p in row if p > 0) for row in p_NE) / tokens / math.log(experts)
    effective = sum(sum(row) ** 2 / sum(w * w for w in row) for row in w_NE) / tokens
    mean = sum(load) / experts
    deviation = math.sqrt(sum((share - mean) ** 2 for share in load) / experts)
    return {
        "load": load,
        "entropy": entropy,
        "effective": effective,
        "cv": deviation / mean,
        "max_vio": max(load) / mean - 1,
        "dead": sum(share < 0.01 * mean for share in load),
    }
