"""How tokens choose experts, and what keeps the choice healthy.

The fields without a neutral value have no default here: a `moe` section must say them, and conf/moe/ does.
"""

from dataclasses import dataclass, field

from lmoe.config.shares import share_of
from lmoe.vocabulary import (
    Backend,
    BalanceScope,
    Decide,
    LoadBalanceType,
    Mixing,
    MixtureScale,
    RouterDtype,
    RouterKind,
    RouterScope,
    RouterTarget,
)


@dataclass(slots=True, kw_only=True)
class LoadBalanceConfig:
    """Load balancing of each site."""

    type: LoadBalanceType | None = None
    """aux_loss: the Switch loss (2101.03961); aux_loss_free: a selection bias moved after each optimizer step
    (2408.15664); importance_cv: squared coefficient of variation of the routing weights (1701.06538); none.
    Required."""
    aux_loss_coef: float | None = None
    """Weight of load_balancing_loss in the training loss. Required with aux_loss and importance_cv."""
    scope: BalanceScope = BalanceScope.micro_batch
    """Tokens that the load f of aux_loss counts: micro_batch, or global_batch: all micro-batches so far of the
    optimizer step, on all ranks (2501.11873)."""
    bias_update_rate: float | None = None
    """Step u of the selection bias, b += u * sign(mean load - load). Required with aux_loss_free."""


@dataclass(slots=True, kw_only=True)
class MoeConfig:
    """Routers, and the auxiliary losses on them."""

    router: RouterKind | None = None
    """{routers}. Required."""  # docs/CONFIG.md puts in what lmoe/rules/routers.py says of each
    router_scope: RouterScope = RouterScope.linear
    """linear: a router for each Linear; block: one for all Linears of a block (gate, up and down; or q, k and v);
    model (router=sequence): one for all sites, which reads hidden states of the prompt (docs/ROUTING.md)."""
    router_layer: str = "-1"
    """router_scope=model: which hidden states of the prompt the router reads: 0: the embeddings, n: the output of the
    n-th decoder layer; negative ones from the end, -1: the last, after the final norm; or a share of the layers such as
    25%, rounded up."""
    prompt_experts: bool = False
    """router_scope=model: whether the experts act on the prompt too. off: only on what follows it, so that one forward
    of the prompt decides and fills the KV cache; on: the prompt is read once more after the decision."""
    decide: Decide = Decide.first
    """router_scope=model, in a conversation: first: the first prompt decides for all of it; turn: each new one decides
    for the answer to it."""
    router_target: RouterTarget = RouterTarget.none
    """What routers are taught, by a cross-entropy on their logits: domain: that of the row; cluster: data.clusters;
    auto: domain where at least two are named and no more than there are experts, else cluster; none."""
    router_target_coef: float = 1.0
    """Weight of that cross-entropy in the training loss, in phases that train routers."""
    router_fit_prompts: int = 0
    """router_scope=model with a router_target: after the last step, fit the router to the targets of so many training
    prompts to the end (docs/ROUTING.md); 0: it stays as the steps have left it."""
    router_dtype: RouterDtype = RouterDtype.float32
    """float32 or bfloat16: type of the router's matmul and softmax, whatever autocast says."""
    router_bias: bool = False
    """Add a learnt bias to the router logits, zero at the start; for routers with logits that learn."""
    temperature: float = 1.0
    """Divides the router logits; above 1 is flatter."""
    temperature_end: float | None = None
    """Temperature from anneal_steps on, reached in a straight line during training; null: temperature throughout."""
    router_noise: float = 0.0
    """Standard deviation of Gaussian noise on the logits, in training only."""
    router_noise_end: float | None = None
    """Noise from anneal_steps on, reached in a straight line; null: router_noise throughout."""
    anneal_steps: str | None = None
    """Optimizer steps, or a share of trainer.max_steps such as 50%, over which temperature and router_noise reach
    their ends; null: 100%."""
    top_p: float | None = None
    """Probability that the chosen experts reach together, above 0 to 1. Required with router=top_p."""
    scale: MixtureScale | None = None
    """Weights of the chosen experts. sum_to_one; unit: each at full scale 1, with the gradient of its probability
    (straight-through); raw: the probabilities as they are. null: sum_to_one where more than one expert can be chosen,
    raw for top_k = 1 and relu (moe_expert_lora, whose weights must sum to 1: unit for top_k = 1). For top_k = 1
    sum_to_one is for routers that are taught (router_target), and is unit there."""
    norm_topk_prob: bool | None = None
    """The same choice by the name in model configs: true is scale=sum_to_one, false is scale=raw; null: see scale.
    true is refused for top_k = 1, where it stops the gradient."""
    mixing: Mixing = Mixing.outputs
    """outputs: sum_e w_e B_e A_e x; factors: (sum_e w_e B_e)(sum_e w_e A_e) x, the other reading of 2510.17898."""
    expert_dropout: float = 0.0
    """Probability with which an expert is left out for a whole row of a micro-batch, in training only; top_k stay, or
    one, where top_k does not act."""
    router_z_loss_coef: float | None = None
    """Weight of router_z_loss (ST-MoE 2202.08906) in the training loss; 0 switches it off. Required."""
    diversity_coef: float = 0.0
    """Weight of the mean squared cosine between the experts of a site in the training loss; 0: off."""
    l1_start: float = 1e-8
    """Weight of relu's L1 at the first step; it then follows the sparsity (2412.14711)."""
    l1_growth: float = 1.2
    """Factor by which relu's L1 weight moves each optimizer step towards injection.top_k active experts a token."""
    domains: list[str] | None = None
    """Domain of each of oracle's experts, or of each target with router_target=domain, in order; null: the domains of
    the data."""
    backend: Backend = Backend.auto
    """stacked: all experts in one matmul; grouped: tokens sorted by expert; auto: the faster one, by
    the table of cards (docs/ROUTING.md); triton: Triton's kernels, on a GPU, never measured on one."""
    load_balance: LoadBalanceConfig = field(default_factory=LoadBalanceConfig)


def states_index(router_layer: str, layers: int) -> int:
    """Which hidden states moe.router_layer means, counted as itself counts them; a share of the layers is looked up.

    Args:
        router_layer: the setting.
        layers: how many the backbone has.

    Raises:
        ValueError: neither a whole number nor a share from 0% to 100%.
    """
    text = str(router_layer).strip()
    try:
        share = share_of(text, layers)
        return int(text) if share is None else share
    except ValueError:
        raise ValueError(
            f"got {router_layer!r}; allowed: a whole number such as 8 or -1, or a share of the layers such as 25%"
        ) from None
