"""Every gate for one token, expert by expert, from the formulas of the papers.

A token has E logits, -inf for an expert that is left out; torch only multiplies, adds and differentiates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor


@dataclass
class Choice:
    """What one token gets.

    Args:
        probs: E scores that sum to 1.
        weights: E routing weights.
        shares: E plain numbers, how the token counts for the load.
        chosen: numbers of the chosen experts, the best first.
    """

    probs: list[Tensor]
    weights: list[Tensor]
    shares: list[float]
    chosen: list[int]


def softmax(z: Tensor, temperature: float) -> list[Tensor]:
    """exp(z_e / T) / sum exp(z / T)."""
    powers = [torch.exp(value / temperature) for value in z]
    return [power / sum(powers) for power in powers]


def weigh(scores: list[Tensor], chosen: list[int], scale: str) -> list[Tensor]:
    """sum_to_one: s_e / sum over the chosen; raw: s_e; unit: 1, with the slope of s_e (Bengio, 1308.3432)."""
    total = sum(scores[e] for e in chosen)
    weights = []
    for e, score in enumerate(scores):
        if e not in chosen:
            weights.append(score * 0)
        elif scale == "sum_to_one":
            weights.append(score / total)
        elif scale == "raw":
            weights.append(score)
        else:
            weights.append(score + float(1 - score.detach().double()))  # a number makes it 1; only s_e has a slope
    return weights


def largest(values: list[float], count: int) -> list[int]:
    """Numbers of the largest values, in falling order."""
    return sorted(range(len(values)), key=lambda e: -values[e])[:count]


def there(z: Tensor) -> list[int]:
    """Numbers of the experts that expert dropout has not left out: z_e = -inf says that it has."""
    return [e for e in range(len(z)) if z[e].item() > -math.inf]


def best(z: Tensor, values: list[float], count: int) -> list[int]:
    """Numbers of the largest values among the experts that are there, in falling order."""
    return sorted(there(z), key=lambda e: -values[e])[:count]


def plain(values: list[Tensor]) -> list[float]:
    """As numbers without gradient."""
    return [value.item() for value in values]


def with_bias(scores: list[Tensor], bias: Tensor | None) -> list[float]:
    """What chooses: s_e + b_e."""
    return [s + (0.0 if bias is None else bias[e].item()) for e, s in enumerate(plain(scores))]


def alike(chosen: list[int], experts: int) -> list[float]:
    """The chosen experts share a token alike."""
    return [1 / len(chosen) if e in chosen else 0.0 for e in range(experts)]


def top_k(z: Tensor, *, k: int, temperature: float, scale: str, bias: Tensor | None = None) -> Choice:
    """Mixtral (2401.04088), Switch (2101.03961); a bias only chooses (2408.15664, equation 3)."""
    probs = softmax(z, temperature)
    chosen = best(z, with_bias(probs, bias), k)
    return Choice(probs, weigh(probs, chosen, scale), alike(chosen, len(probs)), chosen)


def soft(z: Tensor, *, temperature: float, scale: str) -> Choice:
    """L-MoE (2510.17898): w = p."""
    probs = softmax(z, temperature)
    every = there(z)
    return Choice(probs, weigh(probs, every, scale), plain(probs), every)


def top_p(z: Tensor, *, p: float, temperature: float, scale: str) -> Choice:
    """2403.07652, equations 4 to 6: add experts in falling order until their probabilities reach p."""
    probs = softmax(z, temperature)
    chosen: list[int] = []
    for e in best(z, plain(probs), len(probs)):
        if chosen and sum(plain(probs)[c] for c in chosen) >= p:
            break
        chosen.append(e)
    return Choice(probs, weigh(probs, chosen, scale), alike(chosen, len(probs)), chosen)


def sigmoid(z: Tensor, *, k: int, temperature: float, scale: str, bias: Tensor | None = None) -> Choice:
    """DeepSeek-V3 (2412.19437, equations 12 to 16)."""
    scores = [1 / (1 + torch.exp(-value / temperature)) for value in z]
    chosen = best(z, with_bias(scores, bias), k)
    probs = [score / sum(scores) for score in scores]
    return Choice(probs, weigh(scores, chosen, scale), alike(chosen, len(scores)), chosen)


def relu(z: Tensor, *, scale: str) -> Choice:
    """ReMoE (2412.14711, equation 4): positive logits are weights; no positive logit, no expert."""
    chosen = [e for e, value in enumerate(z) if value.item() > 0]
    scores = [value if e in chosen else torch.nan_to_num(value) * 0 for e, value in enumerate(z)]  # -inf * 0 is NaN
    if not chosen:
        return Choice([score + 1 / len(z) for score in scores], scores, [0.0] * len(z), [])
    probs = [score / sum(scores) for score in scores]
    return Choice(probs, weigh(scores, chosen, scale), alike(chosen, len(z)), chosen)


def uniform(z: Tensor, *, scale: str) -> Choice:
    """Every expert alike, whatever z."""
    experts = len(z)
    share = [z.new_tensor(1 / experts) for _ in range(experts)]
    weights = [z.new_tensor(1.0) for _ in range(experts)] if scale == "unit" else share
    return Choice(share, weights, [1 / experts] * experts, list(range(experts)))


def oracle(z: Tensor, *, expert: int) -> Choice:
    """The expert of the token's domain, and no other, whatever z."""
    experts = len(z)
    one = [z.new_tensor(float(e == expert)) for e in range(experts)]
    return Choice(one, one, [float(e == expert) for e in range(experts)], [expert])


def noisy(z: Tensor, z_noise: Tensor, noise: Tensor) -> Tensor:
    """Shazeer (1701.06538, equation 4): z_e + n_e log(1 + exp(z_noise_e))."""
    return torch.stack([z[e] + noise[e] * torch.log(1 + torch.exp(z_noise[e])) for e in range(len(z))])


REFERENCES: dict[str, Callable[..., Choice]] = {
    "top_k": top_k,
    "soft": soft,
    "top_p": top_p,
    "sigmoid": sigmoid,
    "relu": relu,
    "noisy_top_k": top_k,
    "sequence": top_k,
    "uniform": uniform,
    "random": top_k,
    "oracle": oracle,
    "prompt_hash": oracle,
}
"""What each router makes of one token's logits."""


def choose(router: str, z: Tensor, **given: Any) -> Choice:
    """What a router of this name makes of one token's logits.

    Args:
        router: its name in the config.
        z: (E,).
        given: k, p, temperature, scale, bias and expert, of which each takes what it names.
    """
    reference = REFERENCES.get(router)
    assert reference is not None, f"tests/reference/dumb_gates.py: REFERENCES has no loop for the router {router}"
    return reference(z, **{name: given[name] for name in signature(reference).parameters if name in given})
