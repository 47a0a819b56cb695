"""This project's mixture of LoRA experts, with both auxiliary losses."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS, Batch
from benchmarks.peers.trainee import Trainee, language_model_loss
from lmoe.injection.apply import inject, trace
from lmoe.layers.context import RoutingContext
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear, MixtureSettings
from lmoe.layers.routers import RouterSettings
from lmoe.layers.routers.linear import TopKRouter
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.schema.moe import Backend, LoadBalanceType, MixtureScale


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """A mixture in place of each FFN Linear."""
    plan = inject(
        model,
        injection={
            "num_experts": experts.num_experts,
            "top_k": experts.top_k,
            "lora_r": experts.rank,
            "lora_alpha": experts.alpha,
            "lora_dropout": 0.0,
            "attn_lora": {"enabled": False},
        },
        moe={"router": "top_k"},
    )
    assert len(plan.sites) == len(FFN_LINEARS) * model.config.num_hidden_layers

    def loss(batch: Batch) -> Tensor:
        with trace(model, attention_mask=batch.attention_mask) as routing:
            return language_model_loss(model, batch) + routing.auxiliary_loss()

    return Trainee(model, loss)


def wrap(linear: nn.Linear, experts: Experts, backend: Backend = Backend.auto) -> nn.Module:
    """A mixture on one Linear; its trace is off."""
    settings = RouterSettings(
        in_features=linear.in_features,
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        top_p=1.0,
        scale=MixtureScale.sum_to_one,
        dtype=torch.float32,
        selection_bias=False,
        l1_start=0.0,
        fixed_k=True,
        device=linear.weight.device,
    )
    losses = AuxiliaryLosses(balance=LoadBalanceType.none, aux_loss_coef=0.0, router_z_loss_coef=0.0)
    router = TopKRouter(settings, site="layer", trace=RoutingTrace(losses), context=RoutingContext())
    mixture = MixtureSettings(
        num_experts=experts.num_experts,
        lora_r=experts.rank,
        scaling=experts.alpha / experts.rank,
        backend=backend,
    )
    return MixtureLoRALinear(linear, router, mixture)
