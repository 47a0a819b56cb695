"""The plan of one site: what the strategies have in common."""

import math
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lmoe.backbones.layout import LayerLayout
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.errors import InjectionError
from lmoe.injection.choose import attention_linears, spread
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.layers.model_route import MODEL
from lmoe.ops.linear_sizes import sizes
from lmoe.rules.routers import ROUTERS, active_experts, mixture_scale
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import LoadBalanceType, MixtureScale, Role, RouterScope


class SitePlanner:
    """Plans single sites of a model by the sections of a config.

    Args:
        model: the backbone.
        layers: the chosen decoder layers.
        injection, moe: checked sections.
    """

    def __init__(self, model: nn.Module, layers: list[LayerLayout], injection: InjectionConfig, moe: MoeConfig) -> None:
        self.model, self.layers, self.injection, self.moe = model, layers, injection, moe
        self.warnings: list[str] = []
        self._model_router = False  # planned
        self.attention = attention_linears(model, layers, injection, self.warnings)

    def refuse_twice(self, targets: dict[str, nn.Module]) -> None:
        """Refuse a Linear that would get both experts and a single LoRA.

        Raises:
            InjectionError: a Linear that both target_keywords and attn_lora.keywords name.
        """
        if both := sorted(targets.keys() & self.attention.keys()):
            raise InjectionError(
                f"{both[0]} is named by both injection.target_keywords and injection.attn_lora.keywords; "
                "take it out of one of them"
            )

    def refuse_inside(self, blocks: Iterable[str]) -> None:
        """Refuse single LoRA on what becomes experts as a whole.

        Raises:
            InjectionError: attn_lora.keywords names a Linear inside a block that becomes experts as a whole.
        """
        for block in blocks:
            if inside := [path for path in self.attention if path.startswith(f"{block}.")]:
                raise InjectionError(
                    f"injection.attn_lora.keywords names {inside[0]}, and {block} becomes experts as a whole; name "
                    "Linears of attention"
                )

    def rank(self, where: int) -> int:
        """Rank in the layer at position `where` of the chosen ones."""
        return spread(self.injection.lora_r_by_layer, where, len(self.layers)) or self.injection.lora_r

    def num_experts(self, where: int) -> int:
        """Experts in the layer at position `where` of the chosen ones."""
        return spread(self.injection.num_experts_by_layer, where, len(self.layers)) or self.injection.num_experts

    def site(self, path: str, layer: LayerLayout, shape: tuple[int, int], kind: SiteKind, lora_r: int) -> SitePlan:
        """A site with the role lora and the section's scaling, without experts so far."""
        injection = self.injection
        return SitePlan(
            path=path,
            layer=layer.index,
            role=Role.lora,
            kind=kind,
            in_features=shape[0],
            out_features=shape[1],
            lora_r=lora_r,
            lora_alpha=injection.lora_alpha,
            scaling=lora_scaling(injection.lora_alpha, lora_r, injection.use_rslora),
        )

    def single(self, path: str, layer: LayerLayout, linear: nn.Module, where: int) -> SitePlan:
        """A Linear with one LoRA, with the role lora."""
        return self.site(path, layer, sizes(linear), SiteKind.single, self.rank(where))

    def attention_sites(self, layer: LayerLayout) -> list[SitePlan]:
        """Single LoRA on what injection.attn_lora names in a layer."""
        settings, injection = self.injection.attn_lora, self.injection
        rank = settings.lora_r or injection.lora_r
        alpha = injection.lora_alpha if settings.lora_alpha is None else settings.lora_alpha
        return [
            replace(
                self.site(path, layer, sizes(linear), SiteKind.single, rank),
                role=Role.attn_lora,
                lora_alpha=alpha,
                scaling=lora_scaling(alpha, rank, injection.use_rslora),
                use_dora=settings.use_dora,
            )
            for path, linear in self.attention.items()
            if path.startswith(f"{layer.path}.")
        ]

    def routed(self, site: SitePlan, where: int, *, router: str, router_in_features: int, owner: bool) -> SitePlan:
        """The site with E experts.

        Args:
            site: without experts.
            where: position of its layer among the chosen ones.
            router: name of the router.
            router_in_features: what the router looks at.
            owner: whether the router's parameters are counted here.
        """
        num_experts = self.num_experts(where)
        if self.moe.router_scope is RouterScope.model:
            router, owner, self._model_router = MODEL, not self._model_router, True
            router_in_features = int(self.model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
        return replace(
            site,
            num_experts=num_experts,
            active_experts=active_experts(self.moe, self.injection, num_experts),
            router=router,
            router_in_features=router_in_features,
            router_parameters=router_parameters(self.moe, num_experts, router_in_features) if owner else 0,
        )


def lora_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r (2106.09685), or alpha / sqrt(r) (rsLoRA, 2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def router_parameters(moe: MoeConfig, num_experts: int, in_features: int) -> int:
    """Parameters of one router."""
    if moe.router is None or not ROUTERS[moe.router].trains:
        return 0
    return num_experts * (in_features * (1 + len(ROUTERS[moe.router].extra_weights)) + moe.router_bias)


def constant_balance(sites: list[SitePlan], injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """A warning if what balances a site cannot change anything: every expert gets every token."""
    balance = moe.load_balance
    own_routers = STRATEGIES[injection.strategy].own_routers
    if own_routers and (moe.router is None or not ROUTERS[moe.router].fixed_k):
        return []
    full = [site for site in sites if site.num_experts and site.active_experts == site.num_experts]
    if balance.type is LoadBalanceType.aux_loss_free:
        key, why = "type=aux_loss_free", "every load is equal"
    elif balance.type is LoadBalanceType.aux_loss and balance.aux_loss_coef:
        key, why = "aux_loss_coef", "every load is equal"
    elif balance.type is LoadBalanceType.importance_cv and balance.aux_loss_coef and own_routers:
        key, why = "aux_loss_coef", "every weight is equal"
        unit = mixture_scale(moe, injection) is MixtureScale.unit  # else weights of several experts differ
        full = [site for site in full if unit or site.num_experts == 1]
    else:
        return []
    if not full:
        return []
    return [
        f"moe.load_balance.{key} has no effect at {len(full)} sites, first {full[0].path}: "
        f"top_k is the number of experts, so {why}"
    ]
