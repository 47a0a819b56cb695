"""Problems of `moe`: what is missing, out of range, or cannot act with the chosen router."""

from collections.abc import Iterable
from dataclasses import asdict

from lmoe.config.defaults import moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig, states_index
from lmoe.config.phase import start_step
from lmoe.config.problems import above_zero, without_effect
from lmoe.rules.routers import ROUTERS, ExpertsPerToken, RouterDeclaration, routers_of_model, trains_logits
from lmoe.rules.strategies import STRATEGIES, StrategyDeclaration
from lmoe.vocabulary import (
    CHOSEN_ALONE,
    L1_LEAST,
    L1_MOST,
    Backend,
    BalanceScope,
    LoadBalanceType,
    Mixing,
    MixtureScale,
    RouterKind,
    RouterScope,
    RouterTarget,
)

DEFAULT_AUX_LOSS_COEF, DEFAULT_Z_LOSS_COEF = 0.01, 0.001  # of conf/moe/top_k.yaml: left standing, they are no mistake
ORDINARY = MoeConfig()
OWN_KEYS = tuple(dict.fromkeys(key for router in ROUTERS.values() for key in router.keys))
"""Keys that act on some routers only, in the order of the routers."""


def moe_problems(moe: MoeConfig, injection: InjectionConfig) -> list[str]:
    """Problems of `moe`, missing parts first."""
    problems = _missing(moe) + _ranges(moe)
    if not problems and (idle := _strategy_problems(moe, injection)):
        return idle
    if moe.router is not None:
        problems += _idle_settings(moe, ROUTERS[moe.router], injection) + _scale_problems(moe, ROUTERS[moe.router])
        problems += _scope_problems(moe, ROUTERS[moe.router], injection) + _target_problems(moe, injection)
    return problems + _balance_problems(moe)


def _strategy_problems(moe: MoeConfig, injection: InjectionConfig) -> list[str]:
    """Settings that differ from conf/ and that the strategy of the injection has no use for."""
    traits, usual = STRATEGIES[injection.strategy], moe_section({})
    given, left = _leaves(moe), _leaves(usual)
    acting = set(given) - set(traits.idle_moe) if traits.own_routers else set(traits.native_moe)
    problems = [
        without_effect(f"moe.{key}", f"with injection={injection.strategy}")
        for key, value in given.items()
        if value != left[key] and key not in acting and not _acts_anyway(traits, value)
    ]
    if not problems and not traits.own_routers and moe.load_balance.type is LoadBalanceType.aux_loss_free:
        problems.append(
            f"moe.load_balance.type=aux_loss_free cannot act with injection={injection.strategy}: the backbone's "
            "routers choose without a bias of ours; allowed: aux_loss, importance_cv, none"
        )
    return problems


def _acts_anyway(traits: StrategyDeclaration, value: object) -> bool:
    """Whether a value acts where others of its key do not: on the one router, or on whoever computes experts."""
    return (value is RouterScope.model and traits.own_routers) or (value is Backend.triton and traits.any_routers)


def _leaves(moe: MoeConfig) -> dict[str, object]:
    """Values by dotted key."""
    flat = asdict(moe)
    balance = flat.pop("load_balance")
    return flat | {f"load_balance.{key}": value for key, value in balance.items()}


def _missing(moe: MoeConfig) -> list[str]:
    balance, problems = moe.load_balance, []
    if moe.router is None:
        problems.append(f"moe.router is required: {' or '.join(RouterKind)}")
    if moe.router_z_loss_coef is None:
        problems.append("moe.router_z_loss_coef is required: a number, 0 switches the z-loss off (usual: 0.001)")
    if balance.type is None:
        problems.append(f"moe.load_balance.type is required: {' or '.join(LoadBalanceType)}")
    if balance.type in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv) and balance.aux_loss_coef is None:
        problems.append(f"moe.load_balance.aux_loss_coef is required with type={balance.type} (usual: 0.01)")
    if balance.type is LoadBalanceType.aux_loss_free and balance.bias_update_rate is None:
        problems.append("moe.load_balance.bias_update_rate is required with type=aux_loss_free (usual: 0.001)")
    for key in () if moe.router is None else ROUTERS[moe.router].required_keys:
        if getattr(moe, key) is None:
            usual = getattr(moe_section({"router": moe.router}), key)
            problems.append(f"moe.{key} is required with moe.router={moe.router} (usual: {usual})")
    return problems


def _ranges(moe: MoeConfig) -> list[str]:
    balance, problems = moe.load_balance, []
    for key, value in (
        ("router_z_loss_coef", moe.router_z_loss_coef),
        ("load_balance.aux_loss_coef", balance.aux_loss_coef),
        ("router_noise", moe.router_noise),
        ("router_noise_end", moe.router_noise_end),
        ("diversity_coef", moe.diversity_coef),
    ):
        if value is not None and value < 0:
            problems.append(f"moe.{key} is {value}, must be at least 0")
    problems += (
        above_zero(moe.temperature, "moe.temperature")
        + above_zero(moe.temperature_end, "moe.temperature_end")
        + above_zero(balance.bias_update_rate, "moe.load_balance.bias_update_rate")
    )
    if not L1_LEAST <= moe.l1_start <= L1_MOST:
        problems.append(f"moe.l1_start is {moe.l1_start}, must be from {L1_LEAST:g} to {L1_MOST:g}")
    if moe.l1_growth <= 1:
        problems.append(f"moe.l1_growth is {moe.l1_growth}, must be above 1")
    if moe.top_p is not None and not 0 < moe.top_p <= 1:
        problems.append(f"moe.top_p is {moe.top_p}, must be above 0 and at most 1")
    if not 0 <= moe.expert_dropout < 1:
        problems.append(f"moe.expert_dropout is {moe.expert_dropout}, must be from 0 to below 1")
    if moe.anneal_steps is not None:
        try:
            start_step(moe.anneal_steps, 100)
        except ValueError as error:
            problems.append(f"moe.anneal_steps: {error}")
    try:
        states_index(moe.router_layer, 1)
    except ValueError as error:
        problems.append(f"moe.router_layer: {error}")
    if moe.domains is not None and (not moe.domains or len(set(moe.domains)) < len(moe.domains)):
        problems.append(f"moe.domains is {moe.domains}, must be null or a list of different names")
    return problems


def _idle_settings(moe: MoeConfig, traits: RouterDeclaration, injection: InjectionConfig) -> list[str]:
    """Settings that the user changed and that the router has no use for."""
    changed = {
        "temperature": (moe.temperature != ORDINARY.temperature, traits.temperature),
        "temperature_end": (moe.temperature_end is not None, traits.temperature),
        "router_noise": (moe.router_noise > 0, traits.logits),
        "router_noise_end": (moe.router_noise_end is not None, traits.logits),
        "expert_dropout": (moe.expert_dropout > 0, traits.logits),
        "router_dtype": (moe.router_dtype is not ORDINARY.router_dtype, traits.logits),
        "router_bias": (moe.router_bias, traits.logits and traits.trains),
        "router_z_loss_coef": (
            moe.router_z_loss_coef not in (None, 0, DEFAULT_Z_LOSS_COEF),
            traits.logits and traits.trains,
        ),
        "router_scope": (moe.router_scope is RouterScope.block, traits.logits),
        **{
            key: (getattr(moe, key) != getattr(ORDINARY, key), key in traits.keys or _names_targets(moe, key))
            for key in OWN_KEYS
        },
        "mixing": (moe.mixing is Mixing.factors, traits.experts_per_token is not ExpertsPerToken.one),
    }
    why = f"with moe.router={moe.router}"
    problems = [without_effect(f"moe.{key}", why) for key, (given, acts) in changed.items() if given and not acts]
    if moe.anneal_steps is not None and moe.temperature_end is None and moe.router_noise_end is None:
        problems.append(
            "moe.anneal_steps has no effect without moe.temperature_end or moe.router_noise_end; give one of them"
        )
    if moe.backend in CHOSEN_ALONE and not traits.fixed_k and not STRATEGIES[injection.strategy].whole_ffn:
        problems.append(f"moe.backend={moe.backend} needs a fixed number of experts a token; {why} use stacked or auto")
    if moe.backend in CHOSEN_ALONE and moe.mixing is Mixing.factors:
        problems.append(f"moe.backend={moe.backend} cannot compute moe.mixing=factors; use stacked or auto")
    return problems


def idle_dropout_problems(moe: MoeConfig, injection: InjectionConfig) -> list[str]:
    """The problem of expert dropout in a run where all experts stay.

    NOTE an adapter may have such settings, as one of which an expert was taken out.
    """
    acts = moe.router is not None and ROUTERS[moe.router].logits and STRATEGIES[injection.strategy].own_routers
    if moe.router is None or not acts or moe.expert_dropout <= 0:
        return []
    has_k, most = ROUTERS[moe.router].top_k, injection.most_experts
    if most > (injection.top_k if has_k else 1):
        return []
    by = f"injection.top_k={injection.top_k}" if has_k else f"moe.router={moe.router}"
    return [without_effect("moe.expert_dropout", f"with {by} and at most {most} experts a site, all of which stay")]


def _names_targets(moe: MoeConfig, key: str) -> bool:
    return key == "domains" and moe.router_target is not RouterTarget.none


MODEL_KEYS = ("router_layer", "prompt_experts", "decide", "router_fit_prompts")
"""Keys that act on a router of the whole model alone."""
OF_SUPERVISED = ("router_scope", "router_layer", "prompt_experts", "router_target", "router_fit_prompts")
"""Keys that conf/moe/supervised.yaml sets and no other group does."""


def _idle(moe: MoeConfig, keys: Iterable[str], why: str) -> list[str]:
    """A problem of each key that is set and has no effect."""
    return [without_effect(f"moe.{key}", why) for key in keys if getattr(moe, key) != getattr(ORDINARY, key)]


def _idle_unless(moe: MoeConfig, keys: Iterable[str], why: str) -> list[str]:
    """The same where a setting would let them act; of what moe=supervised may have set, the group without it too."""
    left = [key for key in OF_SUPERVISED if getattr(moe, key) != getattr(ORDINARY, key)]
    group = f" or, where moe=supervised has set it, take moe={moe.router}"
    return [
        problem for key in keys for problem in _idle(moe, [key], why + group if key in left and len(left) > 1 else why)
    ]


def _scope_problems(moe: MoeConfig, traits: RouterDeclaration, injection: InjectionConfig) -> list[str]:
    if moe.router_scope is not RouterScope.model:
        other = "" if traits.of_model else f"moe={RouterKind.sequence} "
        why = f"with moe.router_scope={moe.router_scope}; use {other}moe.router_scope={RouterScope.model}"
        return _idle_unless(moe, MODEL_KEYS, why)
    problems = []
    if not traits.of_model:
        scopes = f"{RouterScope.linear} or {RouterScope.block}" if traits.logits else RouterScope.linear
        problems.append(
            f"moe.router_scope=model is for moe={routers_of_model()}, which decides for a whole row; "
            f"with moe.router={moe.router} use router_scope={scopes}, or moe={moe.router}, which brings what goes "
            "with it"
        )
    elif not traits.trains:
        problems += _idle(moe, ("router_layer", "decide"), f"with moe.router={moe.router}, which reads no prompt")
    if injection.num_experts_by_layer:
        problems.append(
            "moe.router_scope=model decides for all sites at once, so injection.num_experts_by_layer cannot give them "
            "different numbers of experts; use injection.num_experts, or routers of each Linear, such as moe=top_k"
        )
    return problems


def _target_problems(moe: MoeConfig, injection: InjectionConfig) -> list[str]:
    coef, problems = moe.router_target_coef, []
    if coef < 0:
        problems.append(f"moe.router_target_coef is {coef}, must be at least 0")
    if moe.router_fit_prompts < 0 or 0 < moe.router_fit_prompts < injection.num_experts:
        least = f"at least the {injection.num_experts} experts"
        problems.append(f"moe.router_fit_prompts is {moe.router_fit_prompts}, must be 0, or {least}")
    if moe.router_target is RouterTarget.none:
        idle = ("router_target_coef", "router_fit_prompts")
        if not trains_logits(moe):
            return problems + _idle(moe, idle, f"with moe.router={moe.router}, which learns nothing")
        return problems + _idle_unless(moe, idle, "with moe.router_target=none; set moe.router_target")
    if not trains_logits(moe):
        problems.append(without_effect("moe.router_target", f"with moe.router={moe.router}, which learns nothing"))
    return problems


def _scale_problems(moe: MoeConfig, traits: RouterDeclaration) -> list[str]:
    problems = []
    if moe.scale is not None and moe.norm_topk_prob is not None:
        problems.append("moe.norm_topk_prob and moe.scale say the same thing; leave one of them out")
    if moe.norm_topk_prob and MixtureScale.raw in traits.scales and MixtureScale.sum_to_one not in traits.scales:
        problems.append(f"moe.norm_topk_prob=true cannot act on moe.router={moe.router}; allowed: null or false")
    if moe.norm_topk_prob is not None and MixtureScale.raw not in traits.scales:
        why = f"with moe.router={moe.router}, whose weights sum to 1"
        problems.append(without_effect("moe.norm_topk_prob", why))
    if moe.scale is not None and moe.scale not in traits.scales:
        allowed = ", ".join(traits.scales) or "none, its one weight is 1"
        problems.append(f"moe.scale={moe.scale} has no effect with moe.router={moe.router}; allowed: {allowed}")
    return problems


def _balance_problems(moe: MoeConfig) -> list[str]:
    balance, problems = moe.load_balance, []
    kind = balance.type
    if kind is None:
        return problems
    if moe.router is not None and kind not in ROUTERS[moe.router].balances:
        allowed = ", ".join(ROUTERS[moe.router].balances)
        problems.append(
            f"moe.load_balance.type={kind} cannot act on moe.router={moe.router}; allowed: {allowed}. "
            f"The group moe={moe.router} sets what goes with it"
        )
    uses_coef = kind in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv)
    if not uses_coef and balance.aux_loss_coef not in (None, 0, DEFAULT_AUX_LOSS_COEF):
        problems.append(
            f"moe.load_balance.aux_loss_coef has no effect with type={kind}; leave it out or use type=aux_loss"
        )
    if kind is LoadBalanceType.importance_cv and _every_weight_is_1(moe):
        problems.append(
            f"moe.load_balance.type=importance_cv has no effect with moe.router={moe.router} and moe.scale=unit, where "
            "every weight is 1; use scale=sum_to_one or type=none"
        )
    if kind is not LoadBalanceType.aux_loss_free and balance.bias_update_rate is not None:
        problems.append(
            f"moe.load_balance.bias_update_rate has no effect with type={kind}; leave it out or use type=aux_loss_free"
        )
    if kind is not LoadBalanceType.aux_loss and balance.scope is BalanceScope.global_batch:
        problems.append(f"moe.load_balance.scope has no effect with type={kind}; leave it out or use type=aux_loss")
    return problems


def _every_weight_is_1(moe: MoeConfig) -> bool:
    """Whether a router that may be balanced gives every expert the weight 1."""
    if moe.router is None or moe.scale is not MixtureScale.unit:
        return False
    router = ROUTERS[moe.router]
    return router.trains and router.experts_per_token is ExpertsPerToken.all
