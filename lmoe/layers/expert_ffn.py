"""A feed-forward block that has become E experts: the same frozen block, each time with other low-rank branches.

Shapes: N tokens, K chosen, S = N * K rows sorted by expert, D hidden, I inner, E experts, O out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe.layers.lora_linear import branch_dtype, has_hooks
from lmoe.layers.model_route import ModelRoute
from lmoe.layers.routers import Router
from lmoe.layers.routing import Decision, Routing
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.ops.expert_blocks import Factors, blocks_pay, expert_blocks
from lmoe.ops.expert_rows import grouped_linear, sum_over_choices
from lmoe.ops.ffn_names import FfnNames
from lmoe.ops.grouped import Groups, group_by_expert
from lmoe.ops.linear_sizes import sizes, weight_OD
from lmoe.ops.lora import faded

COPIES = "base_copies"
"""Name of the experts' own copies of the block under it."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertFfnSettings:
    """What the experts are made from.

    Args:
        num_experts: E.
        lora_r: R of every branch.
        scaling: alpha / R or alpha / sqrt(R).
        dropout: probability on the branches' input.
        lora_B_std: standard deviation of B at the start; 0 leaves the backbone's function unchanged.
        adapted: Linears of the block that carry branches.
        share_base: one frozen block for all experts; else each expert has a copy, which a phase may train.
        by_triton: Triton's kernels compute branches and copies.
    """

    num_experts: int
    lora_r: int
    scaling: float
    dropout: float
    lora_B_std: float
    adapted: tuple[str, ...]
    share_base: bool
    by_triton: bool = False


class ExpertFFN(nn.Module):
    """y = sum_e w_e(x) FFN_e(x), where FFN_e has W + scaling * B_e A_e in place of each W of the block.

    With share_base the frozen products are taken once for all experts: those of x, because every expert reads the same
    x (MixLoRA, 2404.15159), and the one of the last Linear, because it is linear: sum_e w_e W h_e = W sum_e w_e h_e.
    Only activations and branches are per expert.

    Args:
        base_layer: the frozen block.
        names: its parts.
        router: one for the block, or the decision of the model's.
        settings: what the experts are made from.
    """

    def __init__(
        self, base_layer: nn.Module, names: FfnNames, router: Router | ModelRoute, settings: ExpertFfnSettings
    ) -> None:
        super().__init__()
        self.base_layer, self.names, self.settings = base_layer, names, settings
        self.router = router if isinstance(router, Router) else None
        self.model_route = router if isinstance(router, ModelRoute) else None
        self.enabled = True
        self.lora_dropout = nn.Dropout(settings.dropout)
        for name in settings.adapted:
            linear = base_layer.get_submodule(name)
            branch = StackedLoRA(
                settings.num_experts,
                settings.lora_r,
                *sizes(linear),
                scaling=settings.scaling,
                lora_B_std=settings.lora_B_std,
                device=linear.weight.device,  # type: ignore[arg-type]
            )
            self.add_module(name, branch)
        self.base_copies = (
            None
            if settings.share_base
            else nn.ModuleDict({n: Copies(base_layer.get_submodule(n), settings.num_experts) for n in names.linears})
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., D), in the type of the block's output."""
        if not self.enabled:
            return self.base_layer(hidden_states)
        routing = self._routing(hidden_states)
        if routing is None:
            return self.base_layer(hidden_states)
        y = self._experts(hidden_states, routing)
        acting = routing.acting if isinstance(routing, Routing) else None
        if acting is None:
            return y
        return torch.where(acting.unsqueeze(-1), y, self.base_layer(hidden_states))

    def _routing(self, hidden_states: Tensor) -> Decision | None:
        """What the experts do at each token; None: the block stands as it was, on a prompt that is to decide."""
        if self.router is not None:
            return self.router(hidden_states)
        assert self.model_route is not None
        return self.model_route.decision(hidden_states.device)

    def _experts(self, hidden_states: Tensor, routing: Decision) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        indices, gates = chosen(routing)
        groups = group_by_expert(indices, self.settings.num_experts, by_triton=self.settings.by_triton)
        if self._goes_in_blocks(groups):
            y = self._in_blocks(x, gates, groups)
        else:
            inner = self._inner(x, groups)
            y = self._down(inner, gates.to(inner.dtype), groups)
        dropout = self.names.dropout
        y = y if dropout is None else self.base_layer.get_submodule(dropout)(y)
        return y.view(*hidden_states.shape[:-1], y.shape[-1])

    def _goes_in_blocks(self, groups: Groups) -> bool:
        """Whether rows are computed a few at a time, and again in the backward pass: on a CPU, not in a graph, where
        that is faster, and nothing between the frozen products is drawn, trains or has hooks."""
        rows = groups.token
        if rows.device.type != "cpu" or groups.by_triton or torch.compiler.is_compiling():
            return False
        inner_features, _ = sizes(self.base_layer.get_submodule(self.names.down))
        if not blocks_pay(len(rows), inner_features, self.settings.num_experts):
            return False
        if self.base_copies is not None or (self.lora_dropout.training and self.settings.dropout > 0):
            return False
        between = self.base_layer.get_submodule(self.names.activation)
        inside = (*between.modules(), *map(self.get_submodule, self.settings.adapted))
        return not (any(map(has_hooks, inside)) or any(p.requires_grad for p in between.parameters()))

    def _in_blocks(self, x: Tensor, gates: Tensor, groups: Groups) -> Tensor:
        """(N, D): what `_inner` and `_down` compute."""
        firsts = [name for name in (self.names.gate, self.names.up) if name is not None]
        mixed, delta = expert_blocks(
            x.to(branch_dtype(x, self._lora_A())),
            [self.base_layer.get_submodule(name)(x) for name in firsts],
            [self._factors(name) for name in firsts],
            self._factors(self.names.down),
            gates,
            groups,
            self._between,
            self.settings.scaling,
        )
        y = self._frozen_down(mixed, gates)
        return y if delta is None else y + delta.to(y.dtype)

    def _factors(self, name: str) -> Factors | None:
        branch = getattr(self, name, None)
        return None if branch is None else Factors(branch.lora_A, faded(branch.lora_B, branch.fade))

    def _between(self, *values: Tensor) -> Tensor:
        """(..., I): what goes into the last Linear, of what the Linears that read x make of it, (..., W) each."""
        activation = self.base_layer.get_submodule(self.names.activation)
        gate, *up = values[0].chunk(2, dim=-1) if self.names.fused else values
        return activation(gate) * up[0] if up else activation(gate)

    def _inner(self, x: Tensor, groups: Groups) -> Tensor:
        """(S, I): what goes into the last Linear of each expert."""
        branch = self.lora_dropout(x.to(branch_dtype(x, self._lora_A()))).index_select(0, groups.token)
        names = [name for name in (self.names.gate, self.names.up) if name is not None]
        return self._between(*(self._first(name, x, branch, groups) for name in names))

    def _first(self, name: str, x: Tensor, branch: Tensor, groups: Groups) -> Tensor:
        """(S, I): a Linear that reads x."""
        if self.base_copies is None:
            y = self.base_layer.get_submodule(name)(x).index_select(0, groups.token)
        else:
            y = self.base_copies[name](x.index_select(0, groups.token), groups)
        lora = getattr(self, name, None)
        return y if lora is None else y.add_(lora(branch, groups))

    def _down(self, inner: Tensor, gates: Tensor, groups: Groups) -> Tensor:
        """(N, D): the last Linear of each expert, weighted and summed."""
        name = self.names.down
        if self.base_copies is None:
            y = self._frozen_down(sum_over_choices(inner, gates, groups), gates)
        else:
            y = sum_over_choices(self.base_copies[name](inner, groups), gates, groups)
        lora = getattr(self, name, None)
        if lora is None:
            return y
        return y + sum_over_choices(lora(self.lora_dropout(inner), groups), gates, groups).to(y.dtype)

    def _frozen_down(self, mixed: Tensor, gates: Tensor) -> Tensor:
        """(N, D): the last Linear of the block, once for the weighted sum (N, I) of what the experts give it."""
        linear = self.base_layer.get_submodule(self.names.down)
        y, bias = linear(mixed), linear.bias
        if isinstance(bias, Tensor):  # which counts as often as the weights sum to
            y = y + (gates.sum(-1, keepdim=True) - 1).to(y.dtype) * bias.to(y.dtype)
        return y

    def _lora_A(self) -> Tensor:
        """A parameter of the branches, which tells the type that they compute in without autocast."""
        return getattr(self, self.settings.adapted[0]).lora_A


class Copies(nn.Module):
    """E copies of a Linear, as frozen as the rest of the backbone until a phase trains them.

    Args:
        linear: what is copied, with its numbers readable.
        num_experts: E.

    Raises:
        ValueError: the weight is quantised.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OD(linear).detach().expand(num_experts, -1, -1).clone())
        bias = linear.bias
        copied = nn.Parameter(bias.detach().expand(num_experts, -1).clone()) if isinstance(bias, Tensor) else None
        self.register_parameter("bias", copied)
        self.requires_grad_(False)

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """(S, D) to (S, O)."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return grouped_linear(rows, self.weight.to(dtype), groups, bias)


def chosen(routing: Decision) -> tuple[Tensor, Tensor]:
    """(N, K) experts and weights of each token; all E where the number of chosen experts varies."""
    weights = routing.routing_weights.flatten(0, -2)
    if routing.expert_indices is None:
        everyone = torch.arange(weights.shape[-1], device=weights.device)
        return everyone.expand(weights.shape), weights
    indices = routing.expert_indices.flatten(0, -2)
    return indices, weights.gather(-1, indices)
