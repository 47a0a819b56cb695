"""What silencing an expert does to a text, computed anew for each token and expert, without a KV cache.

Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.injection.record import injected
from lmoe.ops.gating import Gate


@torch.no_grad()
def token_change(
    model: PreTrainedModel, ids: Tensor, token: int, expert: int, *, domain: str | None, prompt: Tensor | None
) -> float:
    """log p(x_t | x_<t) with w_e = 0 at position t - 1 alone, less the same with all as it is; forwards of all tokens.

    Args:
        ids: (1, T).
        token: t, from 1.
        domain: for an oracle.
        prompt: (1, T) bool, for routers that decide by the prompt, whose decision stands.
    """
    record = injected(model)
    domains = None if domain is None else [domain]
    about = {"attention_mask": torch.ones_like(ids), "domains": domains, "prompt_mask": prompt}
    with lmoe.trace(model, **about) as trace:
        before = _log_probability(model, ids, token)
    held = {}
    # One decision for all tokens. A router of the whole model reads prompts without experts, so nothing moves it.
    if prompt is not None and record.moe.router_scope != "model":
        for site, r in trace.routing.items():
            last = [None if v is None else v[:, -1:].clone() for v in (r.probs, r.routing_weights, r.assignment)]
            indices = None if r.expert_indices is None else r.expert_indices[:, -1:].clone()
            held[site] = (r.router_logits[:, -1:].clone(), Gate(*last, indices))  # type: ignore[arg-type]
    masks = {}
    for site, count in record.plan.routers.items():
        masks[site] = torch.zeros(1, ids.shape[1], count, dtype=torch.bool)
        masks[site][0, token - 1, expert] = True
    with lmoe.trace(model, **about), record.context.standing.holding(held or None), record.context.silence(masks):
        return _log_probability(model, ids, token) - before


def _log_probability(model: PreTrainedModel, ids: Tensor, token: int) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[0, token - 1]
    return float(logits.double().log_softmax(-1)[ids[0, token]])


@torch.no_grad()
def text_change(model: PreTrainedModel, ids: Tensor, token: int, expert: int) -> float:
    """log p(x_t | x_<t) with w_e = 0 at every site and token, less the same with all as it is."""
    record = injected(model)
    before = _log_probability(model, ids, token)
    with record.context.silence(dict.fromkeys(record.plan.routers, expert)):
        return _log_probability(model, ids, token) - before
