"""Which experts go where."""

from dataclasses import dataclass, field
from typing import Any

from lmoe.vocabulary import InitLora, InjectionStrategy


@dataclass(slots=True, kw_only=True)
class AttnLoraConfig:
    """Single LoRA (no experts, no router) on attention Linears."""

    enabled: bool = True
    """Put LoRA on attention Linears."""
    keywords: list[str] | None = None
    """Names of the Linears; null: q and v of the family, or its fused qkv."""
    lora_r: int | None = None
    """Rank; null: injection.lora_r."""
    lora_alpha: float | None = None
    """Numerator of the scaling alpha / r; null: injection.lora_alpha."""
    use_dora: bool = False
    """Learn the length of each output's weight row apart from its direction (DoRA 2402.09353)."""


@dataclass(slots=True, kw_only=True)
class InjectionConfig:
    """Low-rank experts (2106.09685) and their places."""

    strategy: InjectionStrategy = InjectionStrategy.mixture_lora
    """{strategies}."""  # docs/CONFIG.md puts in what lmoe/rules/strategies.py says of each
    lora_r: int = 16
    """Rank of each expert."""
    lora_alpha: float = 32.0
    """Numerator of the scaling alpha / r of each expert's output."""
    lora_dropout: float = 0.0
    """Dropout on the input of the low-rank branches, once for all experts of a site; 0 to below 1."""
    num_experts: int = 4
    """Experts at each site."""
    top_k: int = 2
    """Experts chosen for each token, 1 to num_experts; with moe.router=relu the mean number that its L1 aims at."""
    use_rslora: bool = False
    """Scaling alpha / sqrt(r) instead of alpha / r (rsLoRA 2312.03732), for experts and single LoRA."""
    shared_lora_r: int | None = None
    """Rank of one more expert at each site that is always on, beside the routed ones; null: none."""
    shared_lora_A: bool = False
    """One lora_A for all experts of a site, each with its own lora_B (HydraLoRA 2404.19245)."""
    init_lora: InitLora = InitLora.random
    """random: Kaiming-uniform lora_A, lora_B by lora_B_std; svd: each expert starts as its own slice of the weight's
    singular directions, and its start is taken off the output, so that nothing changes at first (PiSSA 2404.02948,
    GOAT 2502.16894)."""
    target_keywords: list[str] | None = None
    """Names of the Linears that are adapted; null: every FFN Linear of the family (native_moe_expert_lora: both fused
    tensors). moe_expert_lora: which Linears of the FFN carry LoRA. dense_lora: [] leaves the FFN alone."""
    share_base: bool = True
    """moe_expert_lora: true: one frozen FFN for all experts; false: each expert has a copy of its own, which a phase
    that trains base_ffn needs."""
    start_layer: int = 0
    """First decoder layer that gets experts."""
    num_layers: int = 0
    """How many decoder layers, from start_layer on, are considered; 0: all the rest."""
    stride: int = 1
    """Of these layers every stride-th gets experts."""
    layer_indices: list[int] | None = None
    """The decoder layers that get experts, by number, in place of start_layer, num_layers and stride."""
    num_experts_by_layer: list[int] | None = None
    """Experts by depth, spread evenly over the chosen layers (MoLA 2402.08562), e.g. [2,4,6,8]; null: num_experts."""
    lora_r_by_layer: list[int] | None = None
    """Rank by depth, spread like num_experts_by_layer; the scaling is lora_alpha over the rank of the layer."""
    lora_B_std: float | None = None
    """Standard deviation of lora_B at the start; null: 0, or 0.01 where a phase trains routers before experts."""
    experts_from: Any = None
    """What the experts are at the start. A run (or the name of an adapter on the hub): with as many experts as it has,
    all that it has learnt trains on, such as on other rows; with more (mixture_lora), what it has is kept as it is, and
    only the experts beyond its own train, with their router rows. {code: DIR, chat: DIR} (mixture_lora): adapters by
    name, one expert each, from PEFT or a dense_lora run, behind routers that start anew. null: all start anew."""
    attn_lora: AttnLoraConfig = field(default_factory=AttnLoraConfig)

    @property
    def fewest_experts(self) -> int:
        """Experts of the site that has the fewest."""
        return min(self.num_experts_by_layer or [self.num_experts])

    @property
    def most_experts(self) -> int:
        """Experts of the site that has the most."""
        return max(self.num_experts_by_layer or [self.num_experts])
