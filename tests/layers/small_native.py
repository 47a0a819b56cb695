"""LoRA on the fused experts of Transformers, of a few numbers and away from its start, and its whole experts for the
loop.

E experts of which every token chooses K, D hidden, I inner.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lmoe.layers.native_experts import NativeExpertsLoRA, NativeExpertsSettings, fused_sizes
from tests.reference.dumb_experts import Ffn, Weight

E, K, D, I = 5, 2, 8, 16  # noqa: E741 - the letters of the docstrings
SCALING = 1.7
FUSED = ("gate_up_proj", "down_proj")
KINDS = ("qwen3_moe", "gpt_oss")
"""(E, O, D) without biases, gate before up; and (E, D, O) with biases, gate and up interleaved and clamped."""


def experts(kind: str, *, num_experts: int = E, hidden: int = D, inner: int = I) -> nn.Module:
    """As Transformers makes it, random and frozen."""
    if kind == "qwen3_moe":
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=num_experts)
        made: nn.Module = Qwen3MoeExperts(config)
    else:
        config = GptOssConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=num_experts)
        made = GptOssExperts(config)
    config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.6)
    return made.requires_grad_(False)


def make(
    base: nn.Module, *, adapted: tuple[str, ...] = FUSED, rank: int = 3, dropout: float = 0.0
) -> NativeExpertsLoRA:
    """Branches random, in evaluation mode."""
    settings = NativeExpertsSettings(
        num_experts=base.num_experts,  # type: ignore[arg-type]
        lora_r=rank,
        scaling=SCALING,
        dropout=dropout,
        lora_B_std=0.4,
        fused={name: size for name, size in fused_sizes(base).items() if name in adapted},
    )
    return NativeExpertsLoRA(base, settings).eval()


def routed(tokens: int = 7, *, num_experts: int = E, hidden: int = D, unused: int | None = 3) -> list[Tensor]:
    """(N, D) tokens, (N, K) experts, never the unused one, and (N, K) weights that sum to nothing in particular."""
    generator = torch.Generator().manual_seed(0)
    others = torch.tensor([e for e in range(num_experts) if e != unused])
    picks = [others[torch.randperm(len(others), generator=generator)[:K]] for _ in range(tokens)]
    x = 2 * torch.randn(tokens, hidden, generator=generator)
    return [x, torch.stack(picks), torch.rand(tokens, K, generator=generator) + 0.3]


def whole_experts(site: NativeExpertsLoRA) -> Ffn:
    """What each expert computes, from its full weights; the activations are written out."""
    base = site.base_layer
    transposed = isinstance(base, GptOssExperts)
    gate = _interleaved if transposed else _halves
    up, down = (_weight(site, name, transposed) for name in FUSED)
    return Ffn([up], gate, down)


def _halves(both: Tensor) -> Tensor:
    middle = len(both) // 2
    return silu(both[:middle]) * both[middle:]


def _interleaved(both: Tensor) -> Tensor:
    """(up + 1) gate sigmoid(1.702 gate), with gate at most 7 and up from -7 to 7."""
    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _weight(site: NativeExpertsLoRA, name: str, transposed: bool) -> Weight:
    stored = site.base_layer.get_parameter(name)
    base = [stored[e].t() if transposed else stored[e] for e in range(len(stored))]
    bias = [site.base_layer.get_parameter(f"{name}_bias")[e] if transposed else None for e in range(len(stored))]
    if name not in site.settings.fused:
        return Weight(base, bias)
    branch = site.get_submodule(name)
    return Weight(base, bias, branch.lora_A, branch.lora_B, SCALING)
