"""Each router's declaration: what it has and needs, where its class is, what the documents say of it.

To add a router: a member of RouterKind, an entry here, a gate in lmoe/ops/gating.py with its loop in tests/reference, a
class in lmoe/layers/routers, and conf/moe/<name>.yaml. All choices, checks, documents and tests follow from the entry.
"""

from dataclasses import dataclass
from enum import Enum, auto

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import LoadBalanceType, MixtureScale, RouterKind, RouterScope, RouterTarget

Balance, Scale = LoadBalanceType, MixtureScale
ANY_BALANCE = (Balance.aux_loss, Balance.aux_loss_free, Balance.importance_cv, Balance.none)
LOSSES = (Balance.aux_loss, Balance.importance_cv, Balance.none)
NO_BALANCE = (Balance.none,)
ANY_SCALE = (Scale.sum_to_one, Scale.unit, Scale.raw)
DENSE_SCALE = (Scale.sum_to_one, Scale.unit)


class Need(Enum):
    """What a router must know of a token beside its hidden state."""

    domain = auto()
    prompt = auto()


class ExpertsPerToken(Enum):
    """How many experts work on one token."""

    one = auto()
    top_k = auto()
    about_top_k = auto()
    """From none to all, top_k on average."""
    some = auto()
    """From one to all."""
    all = auto()


@dataclass(slots=True, frozen=True, kw_only=True)
class TableRow:
    """A router's row in docs/ROUTING.md.

    Args:
        chooses: experts of a token; of a baseline what a token gets.
        weights: of the chosen experts; not shown of a baseline.
        use_for: when to take it; of a baseline the question that it answers.
        source: where it is from; not shown of a baseline.
    """

    chooses: str
    weights: str = ""
    use_for: str
    source: str = ""


@dataclass(slots=True, frozen=True, kw_only=True)
class RouterDeclaration:
    """One router.

    Args:
        implementation: dotted name of its class.
        of_model: dotted name of the class that decides for the whole model (moe.router_scope=model); "": there is none.
        description: what docs/CONFIG.md says of it.
        row: its row in docs/ROUTING.md.
        experts_per_token: how many experts work on a token.
        why_no_top_k: why injection.top_k cannot act; "" where it acts.
        why_no_native: what it does that no mixture of Transformers' own does, whose gate is the top_k largest of a
            softmax, token by token; "" where such a gate computes the same once training is over.
        needs: what it must know of a token beside its hidden state.
        prompt_ids: of the prompt it must know the ids of its tokens, not only which tokens they are.
        keys: keys of `moe` that act on it and on no router that does not name them too.
        required_keys: those of `keys` that have no neutral value and must be given.
        extra_weights: names of its (E, D) parameters beside `weight`, one row for each expert.
        logits: it computes router logits, so that the z-loss, noise and expert dropout can act.
        trains: it has parameters; else it is a baseline.
        temperature: moe.temperature acts.
        scores_apart: experts do not compete for a sum, so that the score of one alone is no constant.
        l1: an adaptive L1 keeps its weights sparse and balances it; its class derives from ReluRouter.
        grows_from_mean: a new expert's row starts near the mean of the old ones; else as in a new router.
        usual_scale: what the weights add up to where neither moe.scale nor top_k = 1 says otherwise.
        scales: allowed values of moe.scale; (): the weights sum to 1 whatever it says.
        balances: allowed values of moe.load_balance.type.
    """

    implementation: str
    description: str
    row: TableRow
    of_model: str = ""
    experts_per_token: ExpertsPerToken = ExpertsPerToken.top_k
    why_no_top_k: str = ""
    why_no_native: str = "scores experts otherwise than by a softmax over them"
    needs: Need | None = None
    prompt_ids: bool = False
    keys: tuple[str, ...] = ()
    required_keys: tuple[str, ...] = ()
    extra_weights: tuple[str, ...] = ()
    logits: bool = True
    trains: bool = True
    temperature: bool = True
    scores_apart: bool = False
    l1: bool = False
    grows_from_mean: bool = True
    usual_scale: MixtureScale = Scale.sum_to_one
    scales: tuple[MixtureScale, ...] = ANY_SCALE
    balances: tuple[LoadBalanceType, ...] = ANY_BALANCE

    @property
    def top_k(self) -> bool:
        """Whether injection.top_k acts."""
        return not self.why_no_top_k

    @property
    def fixed_k(self) -> bool:
        """Whether every token gets exactly top_k experts, which the grouped backend needs."""
        return self.experts_per_token is ExpertsPerToken.top_k


EVERY_EXPERT = "which uses every expert"
ROUTERS = {
    RouterKind.top_k: RouterDeclaration(
        implementation="lmoe.layers.routers.token.TopKRouter",
        why_no_native="",
        description="softmax, then the injection.top_k largest",
        row=TableRow(
            chooses="the k largest p = softmax(z)",
            weights="p over its sum in S (k = 1: p)",
            use_for="one choice for each token: sparse, known",
            source="Mixtral 2401.04088, Switch 2101.03961",
        ),
    ),
    RouterKind.soft: RouterDeclaration(
        implementation="lmoe.layers.routers.token.SoftRouter",
        description="softmax over all experts (2510.17898)",
        row=TableRow(
            chooses="all",
            weights="p",
            use_for="few experts; differentiable everywhere",
            source="L-MoE 2510.17898",
        ),
        experts_per_token=ExpertsPerToken.all,
        why_no_top_k=EVERY_EXPERT,
        why_no_native="",
        scales=DENSE_SCALE,
        balances=LOSSES,
    ),
    RouterKind.top_p: RouterDeclaration(
        implementation="lmoe.layers.routers.token.TopPRouter",
        description="the fewest experts that reach moe.top_p (2403.07652)",
        row=TableRow(
            chooses="the fewest that reach `moe.top_p` together",
            weights="as top_k",
            use_for="tokens that need different numbers of experts",
            source="2403.07652",
        ),
        experts_per_token=ExpertsPerToken.some,
        why_no_top_k="which chooses by moe.top_p",
        why_no_native="gives tokens different numbers of experts",
        keys=("top_p",),
        required_keys=("top_p",),
        balances=LOSSES,
    ),
    RouterKind.sigmoid: RouterDeclaration(
        implementation="lmoe.layers.routers.token.SigmoidRouter",
        description="independent scores, then the top_k largest, with a selection bias where "
        "load_balance.type=aux_loss_free (2412.19437, 2408.15664)",
        row=TableRow(
            chooses="the k largest s + b, s = sigmoid(z)",
            weights="s over its sum in S",
            use_for="many experts, balance without a loss",
            source="DeepSeek-V3 2412.19437, 2408.15664",
        ),
        scores_apart=True,
    ),
    RouterKind.relu: RouterDeclaration(
        implementation="lmoe.layers.routers.token.ReluRouter",
        description="positive logits, sparse through an adaptive L1 (2412.14711)",
        row=TableRow(
            chooses="all with z > 0",
            weights="z",
            use_for="smooth switching; k on average, through an L1 that adapts",
            source="ReMoE 2412.14711",
        ),
        experts_per_token=ExpertsPerToken.about_top_k,
        why_no_native="gives tokens different numbers of experts",
        keys=("l1_start", "l1_growth"),
        temperature=False,
        scores_apart=True,
        l1=True,
        grows_from_mean=False,
        usual_scale=Scale.raw,
        scales=(Scale.raw, Scale.unit),  # sum_to_one would leave its L1 nothing to shrink
        balances=LOSSES,
    ),
    RouterKind.noisy_top_k: RouterDeclaration(
        implementation="lmoe.layers.routers.token.NoisyTopKRouter",
        description="top_k of logits with learnt noise (1701.06538)",
        row=TableRow(
            chooses="the k largest of softmax(z + noise * softplus(z'))",
            weights="as top_k",
            use_for="exploration with learnt noise",
            source="1701.06538",
        ),
        why_no_native="",
        extra_weights=("noise_weight",),
    ),
    RouterKind.sequence: RouterDeclaration(
        implementation="lmoe.layers.routers.sequence.SequenceRouter",
        of_model="lmoe.layers.routers.model.ModelRouter",
        description="top_k once for each prompt, from its pooled hidden states",
        row=TableRow(
            chooses="top_k of the mean hidden state of a row's prompt, once for all its tokens",
            weights="as top_k",
            use_for="one skill for one prompt; travels with the KV cache "
            "([ways of generating](BLENDING.md#many-requests-on-one-model))",
        ),
        why_no_native="decides once for a prompt, not for each token",
        needs=Need.prompt,
    ),
    RouterKind.uniform: RouterDeclaration(
        implementation="lmoe.layers.routers.token.UniformRouter",
        description="every expert alike",
        row=TableRow(chooses="all experts alike: one LoRA of rank E * r", use_for="does routing help at all?"),
        experts_per_token=ExpertsPerToken.all,
        why_no_top_k=EVERY_EXPERT,
        why_no_native="is a baseline of studies, which has learnt no gate to write",
        logits=False,
        trains=False,
        temperature=False,
        scales=DENSE_SCALE,
        balances=NO_BALANCE,
    ),
    RouterKind.random: RouterDeclaration(
        implementation="lmoe.layers.routers.token.RandomRouter",
        description="top_k of a frozen random router",
        row=TableRow(
            chooses="top_k of a random router that never trains",
            use_for="does *learning* to route help?",
        ),
        why_no_native="is a baseline of studies, which has learnt no gate to write",
        trains=False,
        balances=NO_BALANCE,
    ),
    RouterKind.oracle: RouterDeclaration(
        implementation="lmoe.layers.routers.token.OracleRouter",
        of_model="lmoe.layers.routers.model.ModelOracle",
        description="the expert of the row's domain",
        row=TableRow(
            chooses="the expert of its row's domain (`injection.num_experts` at least the number of domains)",
            use_for="how far is the router from knowing the domain?",
        ),
        experts_per_token=ExpertsPerToken.one,
        why_no_top_k="which chooses one expert",
        why_no_native="goes by the domain of a row, of which a model is not told",
        needs=Need.domain,
        keys=("domains",),
        logits=False,
        trains=False,
        temperature=False,
        scales=(),
        balances=NO_BALANCE,
    ),
    RouterKind.prompt_hash: RouterDeclaration(
        implementation="lmoe.layers.routers.prompt_hash.PromptHashRouter",
        description="the expert that a hash of the prompt's tokens gives",
        row=TableRow(
            chooses="the expert that a hash of its row's prompt gives, once for all its tokens",
            use_for="is a choice by the prompt better than one by chance?",
        ),
        experts_per_token=ExpertsPerToken.one,
        why_no_top_k="which chooses one expert",
        why_no_native="decides once for a prompt, not for each token",
        needs=Need.prompt,
        prompt_ids=True,
        logits=False,
        trains=False,
        temperature=False,
        scales=(),
        balances=NO_BALANCE,
    ),
}


def routers_that_need(need: Need) -> str:
    """Names of the routers that need it, as a message lists them."""
    return " or ".join(kind for kind, router in ROUTERS.items() if router.needs is need)


def target_count(moe: MoeConfig) -> int:
    """How many targets the routers are taught, once the rows are known; 0: they are taught nothing."""
    return 0 if moe.router_target is RouterTarget.none else len(moe.domains or [])


WITHOUT_TARGETS = "moe=top_k, whose routers learn from the loss, or injection=dense_lora"
"""What rows are learnt with that have nothing to teach a router."""


def cluster_names(count: int) -> list[str]:
    """Names of the targets of moe.router_target=cluster."""
    return [f"cluster{number}" for number in range(count)]


def routers_of_model() -> str:
    """Names of the routers that can decide for the whole model, as a message lists them."""
    return " or ".join(kind for kind, router in ROUTERS.items() if router.of_model)


def needs_domain(moe: MoeConfig) -> bool:
    """Whether the router goes by the domain of a token's row."""
    return moe.router is not None and ROUTERS[moe.router].needs is Need.domain


def needs_prompt(moe: MoeConfig) -> bool:
    """Whether what a router does goes by the prompt of a token's row: its decision, or on which tokens experts act."""
    by_prompt = moe.router is not None and ROUTERS[moe.router].needs is Need.prompt
    return by_prompt or moe.router_scope is RouterScope.model


def reads_prompts_first(moe: MoeConfig) -> bool:
    """Whether a router of the model reads the prompts in a forward of their own, before that of the whole rows."""
    return moe.router is not None and moe.router_scope is RouterScope.model and ROUTERS[moe.router].trains


def needs_prompt_ids(moe: MoeConfig) -> bool:
    """Whether the router goes by the ids of the prompt's tokens."""
    return moe.router is not None and ROUTERS[moe.router].prompt_ids


def reads_openings(moe: MoeConfig) -> bool:
    """Whether the opening of a text without a prompt stands for one; to other routers its first token does."""
    return moe.router_scope is RouterScope.model or needs_prompt_ids(moe)


def mixture_scale(moe: MoeConfig, injection: InjectionConfig) -> MixtureScale:
    """The scale that acts: moe.norm_topk_prob or moe.scale, or the default of the router.

    One expert of a router that is taught weighs 1 where weights are to sum to 1, with the gradient of its probability.
    """
    router = None if moe.router is None else ROUTERS[moe.router]
    one = router is not None and router.fixed_k and injection.top_k == 1
    if moe.norm_topk_prob is not None:
        return MixtureScale.sum_to_one if moe.norm_topk_prob else MixtureScale.raw
    if moe.scale is MixtureScale.sum_to_one and one and moe.router_target is not RouterTarget.none:
        return MixtureScale.unit
    if moe.scale is not None:
        return moe.scale
    if one:
        # a weight below 1 would shrink a whole FFN
        return MixtureScale.unit if STRATEGIES[injection.strategy].whole_ffn else MixtureScale.raw
    return MixtureScale.sum_to_one if router is None else router.usual_scale


def active_experts(moe: MoeConfig, injection: InjectionConfig, num_experts: int) -> int:
    """Experts that work on one token; where it varies without a mean of top_k, the most."""
    if moe.router is None:
        return num_experts
    router = ROUTERS[moe.router]
    if router.experts_per_token is ExpertsPerToken.one:
        return 1
    return injection.top_k if router.top_k else num_experts


def trains_logits(moe: MoeConfig) -> bool:
    """Whether the router has logits that learn, so that the z-loss can act."""
    return moe.router is not None and ROUTERS[moe.router].logits and ROUTERS[moe.router].trains
