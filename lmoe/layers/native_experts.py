"""LoRA on the fused experts that a backbone brings along.

Shapes: N tokens, K chosen, S = N * K rows sorted by expert, D hidden, I inner, E experts.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.ops.expert_rows import grouped_linear, sum_over_choices
from lmoe.ops.grouped import Groups, group_by_expert

DOWN = "down_proj"


@dataclass(slots=True, frozen=True, kw_only=True)
class NativeExpertsSettings:
    """What LoRA on native experts is made from.

    Args:
        num_experts: E.
        lora_r: R of every expert.
        scaling: alpha / R or alpha / sqrt(R).
        dropout: probability on the branches' input.
        lora_B_std: standard deviation of B at the start.
        fused: (D, O) of the fused parameters that carry LoRA, by name.
        by_triton: Triton's kernels compute the experts.
    """

    num_experts: int
    lora_r: int
    scaling: float
    dropout: float
    lora_B_std: float
    fused: dict[str, tuple[int, int]]
    by_triton: bool = False


class NativeExpertsLoRA(nn.Module):
    """Every native expert with its own low-rank branches, (W_e + scaling * B_e A_e) x, inside the grouped forward.

    The forward is its own, whichever experts implementation the config names: rows sorted by expert, grouped matmuls
    for the frozen weights and for the branches. No tensor of the size of the weights is made, forward or backward;
    where torch has no kernel for grouped matmuls, copies of some experts' weights are, in pieces (ops/tiled.py).

    Args:
        base_layer: the experts module of Transformers, with gate_up_proj (E, 2I, D) and down_proj (E, D, I), or both
            transposed where it says is_transposed.
        settings: what the branches are made from.
    """

    def __init__(self, base_layer: nn.Module, settings: NativeExpertsSettings) -> None:
        super().__init__()
        self.base_layer, self.settings, self.enabled = base_layer, settings, True
        self.lora_dropout = nn.Dropout(settings.dropout)
        for name, (in_features, out_features) in settings.fused.items():
            branch = StackedLoRA(
                settings.num_experts,
                settings.lora_r,
                in_features,
                out_features,
                scaling=settings.scaling,
                lora_B_std=settings.lora_B_std,
                device=base_layer.get_parameter(name).device,
            )
            self.add_module(name, branch)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, D), (N, K) and (N, K) to (N, D)."""
        base = self.base_layer
        if not self.enabled:
            return base(hidden_states, top_k_index, top_k_weights)
        groups = group_by_expert(top_k_index, self.settings.num_experts, by_triton=self.settings.by_triton)
        inner = self._project(fused_up(base), hidden_states.index_select(0, groups.token), groups)
        inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)  # type: ignore[operator]
        out = self._project(DOWN, inner, groups)
        if getattr(base, "has_post_expert_norm", False):  # Transformers 5.17 has no experts with such a norm
            out = base.post_expert_norm(out)  # type: ignore[operator]
        return sum_over_choices(out, top_k_weights, groups).to(hidden_states.dtype)

    def _project(self, name: str, rows: Tensor, groups: Groups) -> Tensor:
        base = self.base_layer
        weight = base.get_parameter(name)
        weight_EOD = weight.transpose(1, 2) if base.is_transposed else weight
        bias = base.get_parameter(f"{name}_bias") if base.has_bias else None
        y = grouped_linear(rows, weight_EOD, groups, bias)
        branch = getattr(self, name, None)
        return y if branch is None else y.add_(branch(self.lora_dropout(rows), groups))


def fused_up(experts: nn.Module) -> str:
    """Name of the first fused parameter of an experts module."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def fused_sizes(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """(D, O) of both fused parameters, by name, whatever way round they are stored."""
    sizes = {}
    for name in (fused_up(experts), DOWN):
        _, first, second = experts.get_parameter(name).shape
        sizes[name] = (first, second) if experts.is_transposed else (second, first)
    return sizes


def whole_units(experts: nn.Module) -> bool:
    """Whether rows of the fused weights fill whole units of memory, as a grouped matmul needs."""
    weights = [experts.get_parameter(name) for name in (fused_up(experts), DOWN)]
    return all(size * weight.element_size() % 16 == 0 for weight in weights for size in weight.shape[1:])


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether a plan of Transformers has spread the experts over devices."""
    return bool(getattr(experts, "_is_expert_parallel", False))
