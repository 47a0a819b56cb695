"""From router logits to routing weights: one gate for each way of choosing experts.

Shapes: E experts, K chosen experts; `...` any leading token dimensions.
"""

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lmoe.ops.top_k_weights import check_top_k, top_k_weights
from lmoe.vocabulary import MixtureScale


class Gate(NamedTuple):
    """What a router decided for each token.

    probs: (..., E) scores of all experts, made to sum to 1; what the balance losses and statistics take.
    weights: (..., E) factor of each expert's output; 0 for experts that were not chosen.
    assignment: (..., E) share of the token that each expert gets, without gradient; sums to 1 (relu: or 0, where no
        expert is active). Chosen experts share alike; soft: the probabilities.
    expert_indices: (..., K) the chosen experts, where every token has the same number of them, else None.
    """

    probs: Tensor
    weights: Tensor
    assignment: Tensor
    expert_indices: Tensor | None


def weigh(scores: Tensor, chosen: Tensor, scale: MixtureScale) -> Tensor:
    """Weights of the chosen experts.

    sum_to_one: w_e = s_e / sum_S s;  raw: w_e = s_e;  unit: w_e = 1 with the gradient of s_e (straight-through,
    1308.3432);  for e in S, and 0 elsewhere.

    Args:
        scores: (..., E) probabilities or other scores from 0.
        chosen: (..., E) 1 for e in S, else 0, in the dtype of the scores.
        scale: which of the three.

    Returns:
        (..., E); a token with no chosen expert, or whose chosen scores are all 0, has weights 0 (unit: 1 if chosen).
    """
    kept = scores * chosen
    if scale is MixtureScale.raw:
        return kept
    if scale is MixtureScale.unit:
        return chosen + (kept - kept.detach())  # in this order: exactly 1 or 0
    return kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def staying(logits: Tensor) -> Tensor:
    """(..., E) bool: False for experts that expert dropout has left out (z = -inf).

    Args:
        logits: (..., E) router logits z.
    """
    return logits != -torch.inf


def selection(scores: Tensor, logits: Tensor, bias: Tensor | None) -> Tensor:
    """What the K largest are chosen by: s + b, and -inf for experts that expert dropout has left out (z = -inf), also
    where the score of another one rounds to 0.

    Args:
        scores: (..., E) without gradient.
        logits: (..., E) router logits z.
        bias: (E,) b; None: 0.
    """
    biased = scores if bias is None else scores + bias
    return biased.masked_fill(~staying(logits), -torch.inf)


def shares(expert_indices: Tensor, like: Tensor) -> Tensor:
    """1 / K for the chosen experts and 0 for the others, without gradient.

    Args:
        expert_indices: (..., K).
        like: (..., E) of the dtype of the result.
    """
    return torch.zeros_like(like).detach().scatter_(-1, expert_indices, 1 / expert_indices.shape[-1])


def at_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """z / temperature; the logits themselves where that is the number 1."""
    return logits if not isinstance(temperature, Tensor) and temperature == 1 else logits / temperature


def top_k_gate(
    logits: Tensor,
    *,
    top_k: int,
    temperature: float | Tensor,
    scale: MixtureScale,
    selection_bias: Tensor | None = None,
) -> Gate:
    """p = softmax(z / temperature);  S = the K largest p + b;  weights by `scale`.

    Mixtral (2401.04088; sum_to_one) and Switch (2101.03961, K = 1; raw: renormalising one weight gives the constant 1
    and no gradient to the router). The bias b only chooses (loss-free balancing, 2408.15664, equation 3).

    Args:
        logits: (..., E) router logits z.
        top_k: K, from 1 to E.
        temperature: above 0, a number or (); divides the logits.
        scale: what the weights add up to.
        selection_bias: (E,) b; None: 0.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    z = at_temperature(logits, temperature)
    weights, expert_indices = weights_of_top_k(z, top_k=top_k, scale=scale, selection_bias=selection_bias)
    probs = torch.softmax(z, dim=-1)
    return Gate(probs, weights, shares(expert_indices, probs), expert_indices)


def weights_of_top_k(
    logits: Tensor, *, top_k: int, scale: MixtureScale, selection_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and chosen experts of `top_k_gate`, for logits that the temperature has divided."""
    chosen_by = None
    if selection_bias is not None:
        chosen_by = selection(torch.softmax(logits.detach(), dim=-1), logits, selection_bias)
    return top_k_weights(logits, top_k=top_k, scale=scale, chosen_by=chosen_by)


def sigmoid_gate(
    logits: Tensor,
    *,
    top_k: int,
    temperature: float | Tensor,
    scale: MixtureScale,
    selection_bias: Tensor | None = None,
) -> Gate:
    """s = sigmoid(z / temperature);  S = the K largest s + b;  weights from s by `scale`.

    DeepSeek-V3 (2412.19437, equations 12 to 16; sum_to_one), with the bias of loss-free balancing (2408.15664), which
    only chooses. Experts do not compete for a sum: p = s / sum_e s is for balance losses and statistics.

    Args:
        logits: (..., E) router logits z.
        top_k: K, from 1 to E.
        temperature: above 0, a number or (); divides the logits.
        scale: what the weights add up to.
        selection_bias: (E,) b; None: 0.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    scores = torch.sigmoid(logits / temperature)
    probs = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    check_top_k(top_k, scores.shape[-1])
    chosen_by = selection(scores.detach(), logits, selection_bias)
    expert_indices = chosen_by.topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(scores).detach().scatter_(-1, expert_indices, 1.0)
    return Gate(probs, weigh(scores, chosen, scale), chosen / top_k, expert_indices)


def soft_gate(logits: Tensor, *, temperature: float | Tensor, scale: MixtureScale = MixtureScale.sum_to_one) -> Gate:
    """w = p = softmax(z / temperature); unit: w = 1 with the gradient of p, and 0 where z = -inf.

    The dense router of L-MoE (2510.17898); differentiable everywhere.

    Args:
        logits: (..., E) router logits z.
        temperature: above 0, a number or (); divides the logits.
        scale: sum_to_one or unit.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits; assignment = p.
    """
    probs = torch.softmax(logits / temperature, dim=-1)
    weights = weigh(probs, staying(logits).to(probs.dtype), scale) if scale is MixtureScale.unit else probs
    return Gate(probs, weights, probs.detach(), None)


def top_p_gate(logits: Tensor, *, top_p: float, temperature: float | Tensor, scale: MixtureScale) -> Gate:
    """p = softmax(z / temperature), sorted;  S = the first experts until their sum reaches top_p, at least one, and
    none with z = -inf.

    An undecided token gets more experts ("Harder tasks need more experts", 2403.07652, equations 4 to 6, which weighs
    by the raw probabilities). With sum_to_one a token that one expert decides has the constant weight 1, and gives the
    router no gradient.

    Args:
        logits: (..., E) router logits z.
        top_p: above 0 to 1.
        temperature: above 0, a number or (); divides the logits.
        scale: what the weights add up to.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits; assignment shares a token alike among its experts.

    Raises:
        ValueError: top_p outside 0 to 1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")
    probs = torch.softmax(logits / temperature, dim=-1)
    ordered, order = probs.detach().sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # what the larger ones reach without this expert
    chosen = torch.zeros_like(probs).scatter(-1, order, (before < top_p).to(probs.dtype)).detach()
    chosen = chosen * staying(logits)  # NOTE the sum of all the others may round to less than 1
    return Gate(probs, weigh(probs, chosen, scale), chosen / chosen.sum(-1, keepdim=True), None)


def relu_gate(logits: Tensor, *, scale: MixtureScale = MixtureScale.raw) -> Gate:
    """s = relu(z);  S = experts with s > 0;  weights from s by `scale`.

    ReMoE (2412.14711, equation 4; raw): continuous where an expert switches on, any number of experts a token, kept
    sparse by an adaptive L1 (`relu_l1` in lmoe.ops.routing_losses).

    Args:
        logits: (..., E) router logits z.
        scale: what the weights add up to.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits. A token without active expert has probs = 1 / E,
        and weights and assignment 0.
    """
    scores = torch.relu(logits)
    chosen = (scores > 0).to(scores.dtype).detach()
    total, count = scores.sum(-1, keepdim=True), chosen.sum(-1, keepdim=True)
    tiny = torch.finfo(scores.dtype).tiny
    probs = torch.where(count > 0, scores / total.clamp(min=tiny), 1 / scores.shape[-1])
    return Gate(probs, weigh(scores, chosen, scale), chosen / count.clamp(min=1), None)


def noisy_logits(logits: Tensor, noise_logits: Tensor, noise: Tensor) -> Tensor:
    """z + noise * softplus(z_noise), to be followed by `top_k_gate` (Shazeer, 1701.06538, equation 4).

    softmax over the K kept logits, as in the paper's equation 3, is the same as softmax over all and renormalising
    the K largest.

    Args:
        logits: (..., E) clean logits x W_g.
        noise_logits: (..., E) x W_noise.
        noise: (..., E) standard normal.

    Returns:
        (..., E).
    """
    return logits + noise * softplus(noise_logits)


def uniform_gate(like: Tensor, num_experts: int, *, scale: MixtureScale = MixtureScale.sum_to_one) -> Gate:
    """w_e = 1 / E, or 1 with `unit`: the mixture is one LoRA of rank E * R.

    Args:
        like: (...,) a tensor with the shape, the device and the floating type of the result, less E.
        num_experts: E.
        scale: sum_to_one or unit.

    Returns:
        Gate of (..., E) tensors.
    """
    probs = like.new_full((*like.shape, num_experts), 1 / num_experts)
    return Gate(probs, torch.ones_like(probs) if scale is MixtureScale.unit else probs, probs, None)


def oracle_gate(expert: Tensor, num_experts: int, dtype: torch.dtype) -> Gate:
    """w_e = 1 for the expert of the token's domain, else 0: what perfect knowledge of the domain would choose.

    Args:
        expert: (...,) int64, from 0 to E - 1.
        num_experts: E.
        dtype: type of the result.

    Returns:
        Gate of (..., E) tensors; K = 1.
    """
    # NOTE one_hot would read its largest value back to the host.
    weights = (expert.unsqueeze(-1) == torch.arange(num_experts, device=expert.device)).to(dtype)
    return Gate(weights, weights, weights, expert.unsqueeze(-1))


class NativeScores(StrEnum):
    """What a native router returns beside weights and indices, and so how its scores come from it."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    probabilities = "probabilities"


def native_gate(output: Tensor, weights: Tensor, expert_indices: Tensor, scores: NativeScores) -> tuple[Tensor, Gate]:
    """Router logits z and the gate of a native router.

    softmax: z is the output, p = softmax(z) (Mixtral 2401.04088);  sigmoid: z is the output, p = sigmoid(z) over its
    sum (DeepSeek-V3 2412.19437);  probabilities: p is the output, z = ln p.

    Args:
        output: (..., E) what the router returns first.
        weights: (..., K) weights of the chosen experts, whatever they sum to.
        expert_indices: (..., K) int64.
        scores: which of the three.

    Returns:
        router_logits: (..., E) float32.
        Gate of (..., E) tensors.
    """
    output = output.float()
    if scores is NativeScores.probabilities:
        probs, logits = output, output.clamp(min=torch.finfo(output.dtype).tiny).log()
    elif scores is NativeScores.sigmoid:
        activated, logits = torch.sigmoid(output), output
        probs = activated / activated.sum(-1, keepdim=True).clamp(min=torch.finfo(output.dtype).tiny)
    else:
        probs, logits = torch.softmax(output, dim=-1), output
    empty = torch.zeros_like(probs)
    chosen = empty.scatter(-1, expert_indices, 1.0 / expert_indices.shape[-1])
    return logits, Gate(probs, empty.scatter(-1, expert_indices, weights.float()), chosen, expert_indices)
