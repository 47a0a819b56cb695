"""How tokens choose experts, and what keeps the choice healthy.

The fields without a neutral value have no default here: a `moe` section must say them, and conf/moe/ does.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class RouterKind(StrEnum):
    """How router logits become weights."""

    top_k = "top_k"
    soft = "soft"


class RouterDtype(StrEnum):
    """Type of the router's arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LoadBalanceType(StrEnum):
    """What spreads tokens over experts."""

    aux_loss = "aux_loss"
    none = "none"


@dataclass(slots=True, kw_only=True)
class LoadBalanceConfig:
    """Load balancing of each site."""

    type: LoadBalanceType | None = None
    """aux_loss: the Switch loss (2101.03961) at each site; none. Required."""
    aux_loss_coef: float | None = None
    """Weight of load_balancing_loss in the training loss. Required with aux_loss."""


@dataclass(slots=True, kw_only=True)
class MoeConfig:
    """Routers, and the auxiliary losses on them."""

    router: RouterKind | None = None
    """top_k: softmax, then the injection.top_k largest; soft: softmax over all experts (2510.17898). Required."""
    router_dtype: RouterDtype = RouterDtype.float32
    """float32 or bfloat16: type of the router's matmul and softmax, whatever autocast says."""
    temperature: float = 1.0
    """Divides the router logits before the softmax; above 1 is flatter."""
    norm_topk_prob: bool | None = None
    """Make the chosen weights sum to 1; null: for top_k >= 2. Refused for top_k = 1, where it stops the gradient."""
    router_z_loss_coef: float | None = None
    """Weight of router_z_loss (ST-MoE 2202.08906) in the training loss; 0 switches it off. Required."""
    load_balance: LoadBalanceConfig = field(default_factory=LoadBalanceConfig)
