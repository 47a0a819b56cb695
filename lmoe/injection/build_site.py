"""Modules for the sites of a plan."""

import torch
from torch import Tensor, nn

from lmoe.backbones.layout import LayerLayout
from lmoe.backbones.weight_files import weights_at
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.errors import InjectionError
from lmoe.injection.evaluating import evaluating
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.layers.block_route import BlockRoute
from lmoe.layers.context import RoutingContext
from lmoe.layers.expert_ffn import ExpertFFN, ExpertFfnSettings
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureBeside, MixtureLoRALinear, MixtureSettings
from lmoe.layers.model_route import MODEL, ModelRoute, RouteSettings
from lmoe.layers.native_experts import NativeExpertsLoRA, NativeExpertsSettings
from lmoe.layers.native_router import NativeRouter
from lmoe.layers.prompt_reading import DecoderPlace
from lmoe.layers.routers import Router, RouterSettings, router_class
from lmoe.layers.routers.model import ModelOracle, ModelRouter
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.ffn_names import FfnNames
from lmoe.ops.linear_sizes import PLAIN, sizes, weight_OD
from lmoe.ops.triton_there import require_triton
from lmoe.rules.routers import ROUTERS, mixture_scale
from lmoe.vocabulary import Backend, InitLora, LoadBalanceType

TOLERANCE = 0.02
"""Of the largest output; what the rounding of bfloat16 may make of four tokens."""


@torch.no_grad()
def check_ffn(block: nn.Module, names: FfnNames, path: str) -> None:
    """Try a block on four random tokens beside its parts put together; one on the meta device is believed.

    Raises:
        InjectionError: it computes something else, as a block of a family that nobody has described may.
    """
    if any(parameter.is_meta for parameter in block.parameters()):
        return
    weight = next(block.parameters())
    dtype = next((p.dtype for p in block.parameters() if p.dtype in PLAIN), torch.float32)
    width, _ = sizes(block.get_submodule(names.up))
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    try:
        with evaluating(block):
            expected = block(x)
    except TypeError:  # it reads more than the hidden states
        expected = torch.full_like(x, torch.nan)
    put_together = from_parts(block, names, x)
    if not (expected - put_together).abs().max() <= TOLERANCE * expected.abs().max():  # which nan is not either
        raise InjectionError(
            f"{path} ({type(block).__name__}) computes something else than {names.formula()}; use "
            "injection=mixture_lora, or describe the family in lmoe/backbones/families.py"
        )


def from_parts(block: nn.Module, names: FfnNames, x: Tensor) -> Tensor:
    """The formula of `names` with the parts of a block; (..., D) to (..., D)."""
    activation, up = block.get_submodule(names.activation), block.get_submodule(names.up)(x)
    if names.gate is not None:
        inner = activation(block.get_submodule(names.gate)(x)) * up
    elif names.fused:
        gate, up = up.chunk(2, dim=-1)
        inner = activation(gate) * up
    else:
        inner = activation(up)
    return block.get_submodule(names.down)(inner)


ROUTER = "router"
"""Name of the router under the module that it decides for."""


def router_path(site: str) -> str:
    """Path of the module that is the router of a site; that of the whole model lies on the model itself."""
    return ROUTER if site == MODEL else f"{site}.{ROUTER}"


def decoder_place(layers: list[str], index: int) -> DecoderPlace:
    """Whose hidden states moe.router_layer means.

    Args:
        layers: paths of the decoder layers.
        index: as `states_index` says it.

    Raises:
        InjectionError: there is no such layer, or nothing around the decoder.
    """
    decoder = ".".join(layers[0].split(".")[:-2])  # what holds the list of layers
    if not decoder:
        raise InjectionError("moe.router_scope=model needs a causal language model, and this is its decoder alone")
    try:
        return DecoderPlace.of(decoder, tuple(layers), index)
    except IndexError:
        count = len(layers)
        raise InjectionError(
            f"moe.router_layer is {index}; this backbone has {count} layers: 0 (the embeddings) to {count}, "
            f"-{count + 1} to -1, or a share such as 25%"
        ) from None


class SiteBuilder:
    """Makes the wrapper of each site, and the routers that blocks share.

    Args:
        model: what the sites are in.
        layers: its decoder layers.
        injection, moe: checked sections; moe.router_layer is a number.
        trace, context: what the model's routers share.

    Raises:
        InjectionError: moe.backend=triton, and the package is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[LayerLayout],
        injection: InjectionConfig,
        moe: MoeConfig,
        trace: RoutingTrace,
        context: RoutingContext,
    ) -> None:
        self.model, self.layers, self.injection, self.moe = model, layers, injection, moe
        self.trace, self.context = trace, context
        if moe.backend is Backend.triton:
            require_triton()
        self._blocks: dict[str, BlockRoute] = {}
        self._model_route: ModelRoute | None = None

    def _check(self, site: SitePlan) -> None:
        """Refuse a site that cannot become what is planned.

        Raises:
            InjectionError: a quantised weight where its numbers are needed, too few singular directions, a block with a
                router of its own, or one that computes something else than its parts suggest.
        """
        module, svd = self.model.get_submodule(site.path), self.injection.init_lora is InitLora.svd
        if site.use_dora:
            self._needs_numbers(module, site, "injection.attn_lora.use_dora")
        if site.kind is SiteKind.mixture and svd:
            self._needs_numbers(module, site, "init_lora=svd")
            self._needs_directions(site)
        if site.kind is SiteKind.beside and svd:
            raise InjectionError(f"injection.init_lora=svd needs the weight of a Linear, and {site.path} is a block")
        by_block = site.kind is SiteKind.mixture and site.router not in (site.path, MODEL)
        if by_block and hasattr(self.model.get_submodule(site.router), ROUTER):
            raise InjectionError(f"{site.router} has a {ROUTER} of its own; use moe.router_scope=linear")
        if site.kind is SiteKind.expert_ffn:
            if not self.injection.share_base:
                for name in self._ffn_names(site).linears:
                    self._needs_numbers(module.get_submodule(name), site, f"injection.share_base=false ({name})")
            check_ffn(module, self._ffn_names(site), site.path)

    def wrapper(self, site: SitePlan) -> nn.Module:
        """What is to stand at the site's path; the model stays as it is.

        Raises:
            InjectionError: a site that cannot become what the plan says.
        """
        build = {
            SiteKind.single: self._single,
            SiteKind.mixture: self._mixture,
            SiteKind.beside: self._beside,
            SiteKind.expert_ffn: self._expert_ffn,
            SiteKind.native_experts: self._native_experts,
        }
        with weights_at(self.model, site.path, read=self._reads(site)):
            self._check(site)
            return build[site.kind](site, self.model.get_submodule(site.path))

    def _reads(self, site: SitePlan) -> bool:
        """Whether a wrapper begins with numbers of the weights that it stands for."""
        svd = site.kind is SiteKind.mixture and self.injection.init_lora is InitLora.svd
        return svd or site.use_dora or site.kind is SiteKind.expert_ffn

    def _single(self, site: SitePlan, base_layer: nn.Module) -> nn.Module:
        return LoRALinear(
            base_layer,
            lora_r=site.lora_r,
            scaling=site.scaling,
            dropout=self.injection.lora_dropout,
            use_dora=site.use_dora,
        )

    def _mixture(self, site: SitePlan, base_layer: nn.Module) -> nn.Module:
        return MixtureLoRALinear(base_layer, self._deciding(site, base_layer), self._mixture_settings(site))

    def _beside(self, site: SitePlan, base_layer: nn.Module) -> nn.Module:
        deciding = self._of_model(site, base_layer) or self._router(site, base_layer)
        return MixtureBeside(base_layer, deciding, self._mixture_settings(site), site.in_features)

    def _mixture_settings(self, site: SitePlan) -> MixtureSettings:
        return MixtureSettings(
            num_experts=site.num_experts,
            lora_r=site.lora_r,
            scaling=site.scaling,
            dropout=self.injection.lora_dropout,
            lora_B_std=self.injection.lora_B_std or 0.0,
            svd=self.injection.init_lora is InitLora.svd,
            shared_lora_A=site.shared_lora_A,
            shared_lora_r=site.shared_lora_r or None,
            shared_scaling=site.shared_scaling,
            mixing=self.moe.mixing,
            backend=self.moe.backend,
        )

    def _expert_ffn(self, site: SitePlan, base_layer: nn.Module) -> nn.Module:
        settings = ExpertFfnSettings(
            num_experts=site.num_experts,
            lora_r=site.lora_r,
            scaling=site.scaling,
            dropout=self.injection.lora_dropout,
            lora_B_std=self.injection.lora_B_std or 0.0,
            adapted=tuple(site.branches or ()),
            share_base=self.injection.share_base,
            by_triton=self.moe.backend is Backend.triton,
        )
        deciding = self._of_model(site, base_layer) or self._router(site, base_layer)
        return ExpertFFN(base_layer, self._ffn_names(site), deciding, settings)

    def _ffn_names(self, site: SitePlan) -> FfnNames:
        blocks = (layer.ffn_block for layer in self.layers if layer.ffn_block is not None)
        return next(block.names for block in blocks if block.path == site.path)

    def _native_experts(self, site: SitePlan, base_layer: nn.Module) -> nn.Module:
        settings = NativeExpertsSettings(
            num_experts=site.num_experts,
            lora_r=site.lora_r,
            scaling=site.scaling,
            dropout=self.injection.lora_dropout,
            lora_B_std=self.injection.lora_B_std or 0.0,
            fused=site.branches or {},
            by_triton=self.moe.backend is Backend.triton,
        )
        return NativeExpertsLoRA(base_layer, settings)

    def native_router(self, site: SitePlan) -> nn.Module:
        """The trainable stand-in of a router that the backbone brings along."""
        native = (layer.native for layer in self.layers if layer.native is not None)
        scores = next(layout.scores for layout in native if layout.router == site.router)
        base_layer = self.model.get_submodule(site.router)
        with weights_at(self.model, site.router):
            return NativeRouter(base_layer, scores=scores, site=site.router, trace=self.trace, context=self.context)

    def _of_model(self, site: SitePlan, base_layer: nn.Module) -> ModelRoute | None:
        """The decision of the model's router, which the first site makes; None: the site has another one."""
        if site.router != MODEL:
            return None
        if self._model_route is None:
            router = self._router(site, base_layer)
            assert isinstance(router, ModelRouter | ModelOracle)
            place = self._place()
            settings = RouteSettings(place, prompt_experts=self.moe.prompt_experts, decide=self.moe.decide)
            self._model_route = ModelRoute(router, settings)
        return self._model_route

    def _place(self) -> DecoderPlace:
        """Where the model's router reads hidden states.

        Raises:
            InjectionError: moe.router_layer is beyond the layers, or the backbone has something named like our router.
        """
        if hasattr(self.model, ROUTER):
            raise InjectionError(f"this backbone has a {ROUTER} of its own; use moe.router_scope=linear")
        return decoder_place([layer.path for layer in self.layers], int(self.moe.router_layer))

    def _deciding(self, site: SitePlan, base_layer: nn.Module) -> Router | BlockRoute | ModelRoute:
        """The site's own router, or its block's, which the block's first site makes, or the model's."""
        if (of_model := self._of_model(site, base_layer)) is not None:
            return of_model
        if site.router == site.path:
            return self._router(site, base_layer)
        if site.router not in self._blocks:
            self._blocks[site.router] = BlockRoute(self._router(site, base_layer))
        return self._blocks[site.router]

    def attach_shared_routers(self) -> None:
        """Put the routers that sites share into their blocks, or the model; the last step, because only then the model
        changes."""
        if self._model_route is not None:
            self.model.add_module(ROUTER, self._model_route.router.train(self.model.training))
            self._model_route.attach(self.model)
        for path, route in self._blocks.items():
            block = self.model.get_submodule(path)
            block.add_module(ROUTER, route.router.train(block.training))
            route.attach(block)

    def _router(self, site: SitePlan, base_layer: nn.Module) -> Router:
        moe, injection = self.moe, self.injection
        assert moe.router is not None
        settings = RouterSettings(
            in_features=site.router_in_features,
            num_experts=site.num_experts,
            top_k=injection.top_k if ROUTERS[moe.router].top_k else 1,
            top_p=moe.top_p or 1.0,
            scale=mixture_scale(moe, injection),
            dtype=getattr(torch, moe.router_dtype.value),
            selection_bias=moe.load_balance.type is LoadBalanceType.aux_loss_free,
            l1_start=moe.l1_start,
            fixed_k=ROUTERS[moe.router].fixed_k,
            device=next(base_layer.parameters()).device,
            bias=moe.router_bias,
        )
        kind = router_class(moe.router, moe.router_scope)
        return kind(settings, site=site.router, trace=self.trace, context=self.context)

    def _needs_numbers(self, base_layer: nn.Module, site: SitePlan, what: str) -> None:
        try:
            weight_OD(base_layer)
        except ValueError:
            raise InjectionError(
                f"{what} needs the numbers of the weight, and {site.path} is quantised; choose another setting, or a "
                "base that is stored as plain numbers, with backbone.precision=bfloat16"
            ) from None

    def _needs_directions(self, site: SitePlan) -> None:
        wanted, there = site.num_experts * site.lora_r, min(site.in_features, site.out_features)
        if wanted > there:
            raise InjectionError(
                f"injection.init_lora=svd: {site.num_experts} experts of rank {site.lora_r} need {wanted} singular "
                f"directions, and {site.path} has {there}; lower injection.lora_r or num_experts"
            )
