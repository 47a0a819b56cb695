"""This project's top-k router, on its own and with its trace off."""

import torch

from benchmarks.experts import Experts
from lmoe.layers.context import RoutingContext
from lmoe.layers.routers import RouterSettings
from lmoe.layers.routers.token import TopKRouter
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.vocabulary import LoadBalanceType, MixtureScale


def top_k_router(experts: Experts, in_features: int, device: torch.device) -> TopKRouter:
    """A top-k router in float32; the weights of the chosen experts sum to 1."""
    settings = RouterSettings(
        in_features=in_features,
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        top_p=1.0,
        scale=MixtureScale.sum_to_one,
        dtype=torch.float32,
        selection_bias=False,
        l1_start=0.0,
        fixed_k=True,
        device=device,
    )
    losses = AuxiliaryLosses(balance=LoadBalanceType.none, aux_loss_coef=0.0, router_z_loss_coef=0.0)
    return TopKRouter(settings, site="layer", trace=RoutingTrace(losses), context=RoutingContext())
