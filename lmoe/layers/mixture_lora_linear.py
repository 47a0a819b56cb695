"""A frozen Linear with a mixture of low-rank experts beside it.

Shapes: D in, O out, R rank, E experts, K chosen; `...` any leading token dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmoe.errors import RoutingError
from lmoe.layers.block_route import BlockRoute
from lmoe.layers.lora_linear import LowRank, branch_dtype, one_function_computes
from lmoe.layers.model_route import ModelRoute
from lmoe.layers.routers import LinearRouter, Router
from lmoe.layers.routing import Decision
from lmoe.layers.shared_input import SharedInput, down
from lmoe.ops.card_rules import grouped_is_faster
from lmoe.ops.frozen_linear import Beside
from lmoe.ops.grouped import add_grouped, misaligned
from lmoe.ops.linear_sizes import sizes, weight_OD
from lmoe.ops.lora import faded, kaiming_lora_A, svd_slices
from lmoe.ops.stacked import add_stacked, stacked_delta
from lmoe.ops.triton_there import triton_experts
from lmoe.vocabulary import Backend, Mixing


@dataclass(slots=True, frozen=True, kw_only=True)
class MixtureSettings:
    """What a mixture is made from.

    Args:
        num_experts: E.
        lora_r: R of every expert.
        scaling: alpha / R or alpha / sqrt(R).
        dropout: probability on the experts' input.
        lora_B_std: standard deviation of B at the start; 0 leaves the backbone's function unchanged.
        svd: start each expert at its own slice of the weight's singular directions instead.
        shared_lora_A: one A for all experts.
        shared_lora_r: rank of an expert that is always on; None: none.
        shared_scaling: scaling of that expert.
        mixing: average the experts' outputs, or their factors.
        backend: stacked, grouped, triton, or auto: the faster one of the first two.
    """

    num_experts: int
    lora_r: int
    scaling: float
    dropout: float = 0.0
    lora_B_std: float = 0.0
    svd: bool = False
    shared_lora_A: bool = False
    shared_lora_r: int | None = None
    shared_scaling: float = 1.0
    mixing: Mixing = Mixing.outputs
    backend: Backend = Backend.auto


class MixtureLoRALinear(nn.Module):
    """y = base_layer(x) + scaling * sum_e w_e(x) dropout(x) A_e^T B_e^T, with float32 experts and router.

    Dropout is drawn once for all experts; the router sees the input without it. With svd the branches' own start is
    taken off, B_e A_e - B_e0 A_e0, so that the function starts unchanged whatever the router decides (PiSSA and GOAT
    take a mean start off the frozen weight instead, which is exact for one expert only).

    Args:
        base_layer: the frozen Linear, a quantised one or a Conv1D.
        router: the site's own router, or the decision of its block's or its model's.
        settings: what the mixture is made from.
        shape: (D, O) where the base layer is no Linear.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A_start: Tensor
    lora_B_start: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        router: Router | BlockRoute | ModelRoute,
        settings: MixtureSettings,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer, self.settings, self.enabled = base_layer, settings, True
        self.fade: float | Tensor = 1.0
        self.shared_input: SharedInput | None = None
        self.router = router if isinstance(router, Router) else None
        self.block_route = router if isinstance(router, BlockRoute) else None
        self.model_route = router if isinstance(router, ModelRoute) else None
        (in_features, out_features), device = shape or sizes(base_layer), next(base_layer.parameters()).device
        experts, rank = settings.num_experts, settings.lora_r
        self.lora_dropout = nn.Dropout(settings.dropout)
        shape_A = (1 if settings.shared_lora_A else experts, rank, in_features)
        self.lora_A = nn.Parameter(kaiming_lora_A(shape_A, device))
        # NOTE memory holds B as (E, R, O): so [B_1 .. B_E] is a view of it, and its gradient needs no copy.
        stored = torch.zeros(experts, rank, out_features, device=device)
        self.lora_B = nn.Parameter(stored.transpose(1, 2))
        if settings.lora_B_std:
            nn.init.normal_(self.lora_B, std=settings.lora_B_std)
        if settings.svd:
            self._start_from_singular_directions()
        self.shared_expert = (
            LowRank(in_features, out_features, settings.shared_lora_r, settings.shared_scaling, device)
            if settings.shared_lora_r
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        if not self.enabled:
            return self.base_layer(x)
        if not self._routed():
            return self._without_routed(self.base_layer(x), x)
        dtype = branch_dtype(x, self.lora_A)
        if (found := down(self, x, dtype)) is None:
            y = self.base_layer(x)
            # What another layer returns may be kept by it for its backward pass.
            return self.add_experts(y if type(self.base_layer) is nn.Linear else y.clone(), x)
        routing = self._routing(x, found.logits)
        if found.lora_B is None:
            return self._with_shared(self._grouped(found.y, x.to(dtype), *self.factors(), routing), x)
        return self._with_shared(self._stacked(found.y, found.hidden, found.lora_B.transpose(1, 2), routing), x)

    def beside(self, x: Tensor, dtype: torch.dtype) -> Beside | None:
        """What one function may compute of x (..., D), with that of other sites that read it; None: it may not."""
        base = self.base_layer
        if not (self.enabled and self._routed() and one_function_computes(base, x, dtype, self.lora_dropout)):
            return None
        own = self._token_router()
        router = None if own is None else own.weight.to(own.settings.dtype)
        if self._groups(x, dtype):
            return Beside(base.weight, base.bias, None, None, router)
        lora_A, lora_B = self.factors()
        return Beside(base.weight, base.bias, lora_A.flatten(0, 1), lora_B.transpose(1, 2), router)

    def add_experts(self, y: Tensor, x: Tensor) -> Tensor:
        """The output of the base layer with the experts' beside it.

        Args:
            y: (..., O); may be changed in place.
            x: (..., D).
        """
        if not self._routed():
            return self._without_routed(y, x)
        branch = self.lora_dropout(x.to(branch_dtype(x, self.lora_A)))
        lora_A, lora_B = self.factors()
        if self._groups(x, branch.dtype):
            y = self._grouped(y, branch, lora_A, lora_B, self._routing(x))
        else:
            y = self._stacked(y, linear(branch, lora_A.flatten(0, 1)), lora_B, self._routing(x))
        return self._with_shared(y, branch)

    def _with_shared(self, y: Tensor, branch: Tensor) -> Tensor:
        """y with the expert that is always on, where there is one."""
        return y if self.shared_expert is None else y + self.shared_expert(branch).to(y.dtype)

    def _routed(self) -> bool:
        """Whether routed experts act in this forward: not on a prompt that is to decide for the whole model."""
        return self.model_route is None or self.model_route.acts()

    def _without_routed(self, y: Tensor, x: Tensor) -> Tensor:
        if self.shared_expert is None:
            return y
        return self._with_shared(y, self.lora_dropout(x.to(branch_dtype(x, self.lora_A))))

    def _routing(self, x: Tensor, router_logits: Tensor | None = None) -> Decision:
        if self.router is not None:
            return self.router(x, router_logits)
        if self.model_route is not None:
            decision = self.model_route.decision(x.device)
            assert decision is not None
            return decision.over(x.shape[:-1]) if x.dim() == 2 else decision  # a block may flatten its tokens
        assert self.block_route is not None
        return self.block_route.decision()

    def _token_router(self) -> LinearRouter | None:
        """The site's router, if it looks at each token by itself."""
        router = self.router
        return router if isinstance(router, LinearRouter) and router.reads_every_token() else None

    def _groups(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the grouped backend, or Triton's, computes this forward.

        Raises:
            RoutingError: it was asked for and cannot.
        """
        settings, top_k, device = self.settings, self._fixed_k(), x.device
        if settings.backend is Backend.stacked or top_k is None or settings.mixing is Mixing.factors:
            return False
        experts, rank, width = self.lora_A.shape
        rank *= 2 if settings.svd else 1
        faster = not torch.compiler.is_compiling() and grouped_is_faster(
            num_experts=settings.num_experts, rank=rank, top_k=top_k, device=device, dtype=dtype
        )
        if settings.backend is Backend.auto and not faster:
            return False
        widths = {"lora_r": rank, "in_features": width, "out_features": self.lora_B.shape[1]}
        why = None if settings.backend is Backend.triton else misaligned(widths, device, dtype)
        if experts != settings.num_experts:
            why = "injection.shared_lora_A=true leaves one lora_A for all experts"
        if why and settings.backend is not Backend.auto:
            raise RoutingError(f"moe.backend={settings.backend} cannot compute this site: {why}. Use stacked or auto")
        return why is None

    def _fixed_k(self) -> int | None:
        router = self.router or (self.block_route or self.model_route).router  # type: ignore[union-attr]
        return router.settings.top_k if router.settings.fixed_k else None

    def _stacked(self, y: Tensor, hidden: Tensor, lora_B: Tensor, routing: Decision) -> Tensor:
        weights, scaling = routing.routing_weights, self.settings.scaling
        hidden = hidden.unflatten(-1, (-1, lora_B.shape[-1]))
        if self.settings.mixing is Mixing.factors:
            delta = stacked_delta(hidden, lora_B, weights, mixing=Mixing.factors) * scaling
            return y + delta.to(y.dtype)
        if torch.compiler.is_compiling():  # it fuses by itself what the other path does by hand
            return y + stacked_delta(hidden, lora_B, weights * scaling).to(y.dtype)
        return add_stacked(y, hidden, lora_B, weights, scaling)

    def _grouped(self, y: Tensor, branch: Tensor, lora_A: Tensor, lora_B: Tensor, routing: Decision) -> Tensor:
        indices = routing.expert_indices
        assert indices is not None
        gates = (routing.routing_weights * self.settings.scaling).gather(-1, indices)
        K = indices.shape[-1]
        flat_y, flat_x = y.view(-1, y.shape[-1]), branch.reshape(-1, branch.shape[-1])
        by_triton = self.settings.backend is Backend.triton
        add = triton_experts(y.device).add_by_triton if by_triton else add_grouped
        return add(flat_y, flat_x, lora_A, lora_B, gates.view(-1, K), indices.view(-1, K)).view_as(y)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the mixture; with svd [A; A_0] and [B, -B_0], of twice the rank."""
        if not self.settings.svd:
            return self.lora_A, faded(self.lora_B, self.fade)
        lora_A = torch.cat([self.lora_A, self.lora_A_start], dim=1)
        return lora_A, faded(torch.cat([self.lora_B, -self.lora_B_start], dim=2), self.fade)

    def _start_from_singular_directions(self) -> None:
        settings = self.settings
        weight = weight_OD(self.base_layer)
        slices_A, slices_B = svd_slices(weight, settings.num_experts, settings.lora_r, settings.scaling)
        with torch.no_grad():
            self.lora_A.copy_(slices_A)
            self.lora_B.copy_(slices_B)
        self.register_buffer("lora_A_start", self.lora_A.detach().clone())
        self.register_buffer("lora_B_start", self.lora_B.detach().clone())


class MixtureBeside(MixtureLoRALinear):
    """y = block(x) + scaling * sum_e w_e(x) dropout(x) A_e^T B_e^T.

    Args:
        base_layer: a block that reads (..., D) and returns (..., D), alone or first in a tuple.
        router: one for the block, or the decision of the model's.
        settings: what the mixture is made from.
        width: D.
    """

    def __init__(
        self, base_layer: nn.Module, router: Router | ModelRoute, settings: MixtureSettings, width: int
    ) -> None:
        super().__init__(base_layer, router, settings, (width, width))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """(..., D) to what the block returns."""
        output = self.base_layer(x)
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return self.add_experts(output[0].clone(), x), *output[1:]
        return self.add_experts(output.clone(), x)
