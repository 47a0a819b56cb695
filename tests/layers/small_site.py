"""A MixtureLoRALinear of a few numbers with any router, away from its start."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe.layers.context import RoutingContext
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear, MixtureSettings
from lmoe.layers.routers import Router, RouterSettings, router_class
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.rules.routers import ROUTERS, RouterDeclaration
from lmoe.vocabulary import Backend, LoadBalanceType, Mixing, MixtureScale, RouterKind

D, O = 8, 12  # noqa: E741 - the letters of the docstrings; multiples of four, as the grouped backend needs


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a small site is made from; the words are those of the config."""

    router: str = "top_k"
    experts: int = 3
    top_k: int = 2
    top_p: float = 0.6
    rank: int = 4
    scale: str = "raw"
    temperature: float = 1.0
    scaling: float = 1.7
    mixing: str = "outputs"
    backend: str = "stacked"
    shared_lora_A: bool = False
    shared_lora_r: int | None = None
    svd: bool = False
    dropout: float = 0.0
    bias: bool = False
    balance: str = "aux_loss"
    dtype: torch.dtype = torch.float32
    router_dtype: torch.dtype | None = None
    seed: int = 0

    @property
    def declared(self) -> RouterDeclaration:
        """What is declared of its router."""
        return ROUTERS[RouterKind(self.router)]

    def settings(self) -> RouterSettings:
        """Those of its router."""
        return RouterSettings(
            in_features=D,
            num_experts=self.experts,
            top_k=self.top_k,
            top_p=self.top_p,
            scale=MixtureScale(self.scale),
            dtype=self.router_dtype or self.dtype,
            selection_bias=self.bias,
            l1_start=0.25,
            fixed_k=self.declared.fixed_k,
            device=torch.device("cpu"),
        )

    def make_router(self) -> Router:
        """With a trace that weighs every loss by 1."""
        torch.manual_seed(self.seed)
        losses = AuxiliaryLosses(
            balance=LoadBalanceType(self.balance),
            aux_loss_coef=1.0,
            router_z_loss_coef=1.0,
            l1_top_k=self.top_k if self.declared.l1 else None,
        )
        context = RoutingContext(temperature=self.temperature)
        router = router_class(RouterKind(self.router))(
            self.settings(), site="site", trace=RoutingTrace(losses), context=context
        )
        with torch.no_grad():
            for name in ("weight", *self.declared.extra_weights, "selection_bias"):
                values = getattr(router, name, None)
                if values is not None:
                    values.normal_(std=0.2 if name == "selection_bias" else 0.6)
        return router.to(self.dtype)

    def make(self) -> MixtureLoRALinear:
        """Experts and router random, the base frozen, in evaluation mode."""
        router = self.make_router()
        base = nn.Linear(D, O).requires_grad_(False)
        settings = MixtureSettings(
            num_experts=self.experts,
            lora_r=self.rank,
            scaling=self.scaling,
            dropout=self.dropout,
            svd=self.svd,
            shared_lora_A=self.shared_lora_A,
            shared_lora_r=self.shared_lora_r,
            shared_scaling=0.8,
            mixing=Mixing(self.mixing),
            backend=Backend(self.backend),
        )
        site = MixtureLoRALinear(base, router, settings)
        with torch.no_grad():
            for name, parameter in site.named_parameters():
                if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B"):
                    parameter.normal_(std=0.5)
        return site.to(self.dtype).eval()


def trained(site: MixtureLoRALinear) -> dict[str, Tensor]:
    """Parameters with a gradient, by name."""
    return {name: parameter for name, parameter in site.named_parameters() if parameter.requires_grad}


def router_of(site: MixtureLoRALinear) -> Router:
    """The site's own."""
    assert site.router is not None
    return site.router
