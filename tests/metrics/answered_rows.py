"""Routing of rows with a prompt and an answer each, of tiny models with every kind of router."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.injection.record import injected
from lmoe.injection.roles import parameter_roles
from lmoe.layers.routing import Routing
from lmoe.rules.routers import needs_prompt
from lmoe.vocabulary import Role
from tests.tiny_models import randomise, tiny_model, tokens

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "top_k": ("qwen3", {}, {"router": "top_k"}),
    "sites of several sizes": ("qwen3", {"num_experts_by_layer": [4, 3]}, {"router": "top_k"}),
    "block": ("qwen3", {}, {"router": "top_k", "router_scope": "block"}),
    "top_p": ("qwen3", {}, {"router": "top_p"}),
    "sigmoid": ("qwen3", {}, {"router": "sigmoid"}),
    "relu": ("qwen3", {}, {"router": "relu"}),
    "soft": ("qwen3", {}, {"router": "soft"}),
    "sequence": ("qwen3", {}, {"router": "sequence"}),
    "model": ("qwen3", {}, {"router": "sequence", "router_scope": "model"}),
    "native": ("qwen3_moe", {"strategy": "native_moe_expert_lora"}, {}),
}
"""Family, sections injection and moe, by what is in front of the experts."""
PAIRS, LENGTH = 3, 9
PROMPTS = (2, 3, 2)
ENDS = (6, 9, 7, 9, 3, 7)
"""Where the prompts of the pairs and the answers of the six rows end; the second rejected answer is empty."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Rows of pairs: all chosen answers, then the rejected ones.

    Args:
        model: in evaluation mode.
        routing: of the rows, by site.
        ids: (R, T).
        valid, prompt: (R, T) bool.
    """

    model: PreTrainedModel
    ids: Tensor
    routing: dict[str, Routing]
    valid: Tensor
    prompt: Tensor

    @property
    def answers(self) -> Tensor:
        """(R, T) bool."""
        return self.valid & ~self.prompt

    @property
    def num_experts(self) -> dict[str, int]:
        """E of each site."""
        return injected(self.model).plan.routers


def rows_of(routing: dict[str, Routing], rows: list[int]) -> dict[str, Routing]:
    """The routing of some rows."""
    return _mapped(routing, lambda tensor: tensor[rows])


def with_nan(routing: dict[str, Routing], kept: Tensor) -> dict[str, Routing]:
    """The same with NaN at the tokens that are not kept."""

    def spoilt(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(~kept.unsqueeze(-1), torch.nan) if tensor.is_floating_point() else tensor

    return _mapped(routing, spoilt)


def _mapped(routing: dict[str, Routing], function) -> dict[str, Routing]:
    names = ("router_logits", "probs", "routing_weights", "assignment", "acting")
    changed = {}
    for site, r in routing.items():
        tensors = {name: getattr(r, name) for name in names}
        changed[site] = replace(r, **{name: None if t is None else function(t) for name, t in tensors.items()})
    return changed


def kept_tokens(routing: Routing, counted: Tensor) -> Tensor:
    """(R, T) bool: those of the mask on which experts act."""
    return counted if routing.acting is None else counted & routing.acting


@cache
def answered(kind: str) -> Answered:
    """Three pairs in front of a model of MODELS."""
    family, injection, moe = MODELS[kind]
    model = tiny_model(family)
    lmoe.inject(model, {"lora_r": 4, **injection}, moe)
    randomise(model)
    place = torch.arange(LENGTH)
    prompt = (place < torch.tensor(PROMPTS)[:, None]).repeat(2, 1)
    ids = torch.where(prompt, tokens(PAIRS, LENGTH).repeat(2, 1), tokens(2 * PAIRS, LENGTH, seed=1))
    valid = place < torch.tensor(ENDS)[:, None]
    model.eval()
    routing = routing_of(model, ids, valid, prompt)
    return Answered(model=model, ids=ids, routing=routing, valid=valid, prompt=prompt)


@cache
def moved(kind: str) -> dict[str, Routing]:
    """The routing of the same rows after the routers have changed a little."""
    before = answered(kind)
    model = before.model
    roles, generator = parameter_roles(model), torch.Generator().manual_seed(5)
    started = {name: p.detach().clone() for name, p in model.named_parameters() if roles[name] is Role.router}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in started:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        found = routing_of(model, before.ids, before.valid, before.prompt)
        model.load_state_dict(started, strict=False)
    return found


@torch.no_grad()
def routing_of(model: PreTrainedModel, ids: Tensor, valid: Tensor, prompt: Tensor) -> dict[str, Routing]:
    """Routing of a forward, by site."""
    told = prompt if needs_prompt(injected(model).moe) else None
    with lmoe.trace(model, attention_mask=valid.long(), prompt_mask=told) as trace:
        model(input_ids=ids, attention_mask=valid.long(), use_cache=False)
        return dict(trace.routing)
