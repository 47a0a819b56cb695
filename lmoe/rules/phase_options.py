"""Problems of what a phase may set beside its start and its roles: plateau, layers, coefficients, handoff."""

from collections.abc import Iterable, Sequence

from lmoe.config.data import DataConfig
from lmoe.config.defaults import moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.optim import OptimConfig
from lmoe.config.phase import PLATEAU, HandoffConfig, PhaseConfig, PlateauConfig, start_step
from lmoe.config.problems import at_least, changed_keys, without_effect
from lmoe.config.run import RunConfig
from lmoe.rules.experts_from import source_run
from lmoe.rules.routers import ROUTERS, mixture_scale, reads_prompts_first, trains_logits
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import LoadBalanceType, LrSchedule, MixtureScale, Role, RouteBy, RouterTarget

TRAIN_LOSS = "train/loss"
ALWAYS_BY_TARGET = "where every phase has route_by=target"
LOAD_OF_ROWS = "and the rows say how much each expert gets"


def option_problems(
    key: str, phase: PhaseConfig, trained: Iterable[Role], steps: int | None, config: RunConfig
) -> list[str]:
    """Problems of one phase.

    Args:
        key: of the phase.
        phase: as written.
        trained: all roles that train in it, whatever its mode.
        steps: of it; None: a plateau decides.
        config: of the run.
    """
    roles = set(trained)
    return (
        _lr_problems(f"{key}.lr", phase.lr, roles, config.optim)
        + _plateau_problems(key, phase, config)
        + _layer_problems(f"{key}.target_layers", phase.target_layers)
        + _coefficient_problems(key, phase, roles, config.moe, config.injection)
        + _target_problems(key, phase, roles, config)
        + _handoff_problems(f"{key}.lora_handoff", phase.lora_handoff, roles, steps, config.injection)
    )


def handoff_order_problems(phases: Iterable[tuple[str, PhaseConfig]]) -> list[str]:
    """Problems of handoffs in their order: what has faded in one phase stays so, and cannot fade in another one.

    Args:
        phases: (key, phase) by start.
    """
    problems, faded = [], []
    for key, phase in phases:
        handoff = phase.lora_handoff
        if handoff.role is None:
            continue
        for before, role, experts in faded:
            if role is handoff.role and _share_experts(experts, handoff.experts):
                problems.append(
                    f"{key}.lora_handoff fades {role}, which {before}.lora_handoff has faded already; leave one out"
                )
        faded.append((key, handoff.role, handoff.experts))
    return problems


def target_problems(phases: Sequence[PhaseConfig], moe: MoeConfig) -> list[str]:
    """Problems of moe.router_target that no phase has a use for.

    Args:
        phases: with all roles that train in them.
        moe: the section.
    """
    by_router = [phase for phase in phases if Role.router in phase.trainable]
    by_target = any(phase.route_by is RouteBy.target for phase in phases)
    if moe.router_target is RouterTarget.none:
        return []
    problems, untrained = [], "where no phase trains routers; add router to a trainable"
    if not by_router and not by_target:
        why = "where no phase trains routers and none has route_by=target; add router to a trainable"
        problems.append(without_effect(f"moe.router_target={moe.router_target}", why))
    if moe.router_fit_prompts and not by_router:
        problems.append(without_effect("moe.router_fit_prompts", untrained))
    own = all(phase.router_target_coef is not None for phase in by_router)
    if own and moe.router_target_coef != MoeConfig().router_target_coef:
        why = "where each phase that trains routers sets its own" if by_router else untrained
        problems.append(without_effect("moe.router_target_coef", why))
    return problems


def idle_by_target_problems(config: RunConfig) -> list[str]:
    """Problems of what cannot act in a run all of whose phases go by target.

    NOTE a run that goes on may have been begun with such settings. Those that its router's group in conf/ has are no
    mistake.
    """
    moe, problems = config.moe, []
    taught = moe.router is not None and moe.router_target is not RouterTarget.none
    if not taught or not always_by_target(config.phase.phases.values()):
        return []
    if moe.expert_dropout > 0:
        problems.append(without_effect("moe.expert_dropout", f"{ALWAYS_BY_TARGET}, where no expert is dropped"))
    free = moe.load_balance.type is LoadBalanceType.aux_loss_free
    kept = free and source_run(config.injection) is not None  # its routers have a bias, which goes on with them
    if moe.load_balance != moe_section({"router": moe.router}).load_balance and not kept and _is_idle_by_target(config):
        problems.append(
            f"moe.load_balance.type={moe.load_balance.type} has no effect {ALWAYS_BY_TARGET}, {LOAD_OF_ROWS}; leave it "
            "out, or use phase=supervised_routing, whose last steps go by the router"
        )
    return problems


def idle_balance(config: RunConfig) -> list[str]:
    """The same of a balance, as a warning for a run whose targets are decided, wherever its settings are from."""
    if not always_by_target(config.phase.phases.values()) or not _is_idle_by_target(config):
        return []
    return [f"moe.load_balance.type={config.moe.load_balance.type} has no effect {ALWAYS_BY_TARGET}, {LOAD_OF_ROWS}"]


def _is_idle_by_target(config: RunConfig) -> bool:
    """Whether there is a balance that changes nothing in phases by target."""
    moe, kind = config.moe, config.moe.load_balance.type
    coefs = [moe.load_balance.aux_loss_coef, *(phase.aux_loss_coef for phase in config.phase.phases.values())]
    has_loss = kind in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv)
    on = kind is LoadBalanceType.aux_loss_free or (has_loss and any(coefs))
    return on and not balances_by_target(moe, config.injection, config.data)


def balances_by_target(moe: MoeConfig, injection: InjectionConfig, data: DataConfig) -> bool:
    """Whether what balances the load can act in a phase by target, as far as it shows before rows are read.

    No bias moves there. A loss may choose among several experts of a target, of one each the probability is 1.
    """
    kind, count = moe.load_balance.type, len(moe.domains or []) or data.clusters
    if kind is LoadBalanceType.aux_loss_free:
        return False
    if count is None and moe.router_target is RouterTarget.cluster:
        count = injection.fewest_experts
    apart = moe.router is not None and ROUTERS[moe.router].scores_apart
    apart = apart and mixture_scale(moe, injection) is not MixtureScale.sum_to_one
    return count is None or injection.most_experts > count or (kind is LoadBalanceType.importance_cv and apart)


def always_by_target(phases: Iterable[PhaseConfig]) -> bool:
    """Whether the targets of rows choose among experts from the first step to the last, so that no router does."""
    return all(phase.route_by is RouteBy.target for phase in phases)


def untaught(phases: Iterable[tuple[str, PhaseConfig]], moe: MoeConfig) -> list[str]:
    """A warning where experts train on targets that no router learns to choose.

    Args:
        phases: by name, with all roles that train in them.
        moe: the section.
    """
    by_target = [name for name, phase in phases if phase.route_by is RouteBy.target]
    if not by_target or any(target_coef(phase, moe) for _, phase in phases):
        return []
    return [
        f"phase.phases.{by_target[0]}.route_by=target trains experts on targets that no router learns to choose, and "
        "validation and inference go by the routers: train router in a phase with a router_target_coef above 0"
    ]


def target_coef(phase: PhaseConfig, moe: MoeConfig) -> float:
    """Weight of the cross-entropy of moe.router_target in a phase.

    Args:
        phase: with all roles that train in it.
        moe: the section.
    """
    if moe.router_target is RouterTarget.none:
        return 0.0
    if phase.router_target_coef is not None:
        return phase.router_target_coef
    return moe.router_target_coef if Role.router in phase.trainable else 0.0


def schedule_problems(config: RunConfig) -> list[str]:
    """Problems of learning-rate settings that some schedule must have asked for."""
    used = {phase.schedule or config.optim.schedule for phase in config.phase.phases.values()}
    problems = []
    if not 0 < config.optim.decay_share <= 1:
        problems.append(f"optim.decay_share is {config.optim.decay_share}, must be above 0 and at most 1")
    elif LrSchedule.wsd not in used and config.optim.decay_share != type(config.optim)().decay_share:
        problems.append(without_effect("optim.decay_share", "where no schedule is wsd"))
    if used == {LrSchedule.constant} and config.optim.min_lr_ratio:
        problems.append(without_effect("optim.min_lr_ratio", "with optim.schedule=constant"))
    return problems


def own_rates(roles: Iterable[Role], optim: OptimConfig) -> bool:
    """Whether each of the roles has a learning rate of its own."""
    return all((own := optim.roles.get(role.value)) is not None and own.lr is not None for role in roles)


def _lr_problems(key: str, lr: float | None, trained: set[Role], optim: OptimConfig) -> list[str]:
    if lr is None or not own_rates(trained, optim):
        return []
    return [without_effect(key, "where optim.roles.<role>.lr is set for every role that trains in the phase")]


def _plateau_problems(key: str, phase: PhaseConfig, config: RunConfig) -> list[str]:
    plateau = phase.plateau
    if phase.start != PLATEAU:
        return [
            without_effect(f"{key}.plateau.{name}", f"with {key}.start={phase.start}; set start=plateau")
            for name in changed_keys(plateau, PlateauConfig())
        ]
    problems = at_least(plateau.patience, 1, f"{key}.plateau.patience")
    problems += at_least(plateau.min_delta, 0, f"{key}.plateau.min_delta")
    problems += at_least(plateau.every_n_steps, 1, f"{key}.plateau.every_n_steps")
    of_train = plateau.monitor == TRAIN_LOSS
    if not of_train and not (plateau.monitor.startswith("val/") and plateau.monitor.endswith("loss")):
        problems.append(
            f"{key}.plateau.monitor={plateau.monitor}: allowed: val/loss, val/<domain>/loss and {TRAIN_LOSS}"
        )
    if not of_train and plateau.every_n_steps != PlateauConfig().every_n_steps:
        problems.append(
            without_effect(f"{key}.plateau.every_n_steps", f"with monitor={plateau.monitor}, looked at each validation")
        )
    if not of_train and config.trainer.val_every_n_steps == 0:
        problems.append(f"{key}.start=plateau looks at {plateau.monitor}: set trainer.val_every_n_steps above 0")
    return problems


def _layer_problems(key: str, layers: list[int] | None) -> list[str]:
    if layers is None:
        return []
    if not layers:
        return [f"{key} is empty, so no layer would train; leave it out for all layers"]
    return [f"{key} names layer {min(layers)} twice"] if len(set(layers)) < len(layers) else []


def _coefficient_problems(
    key: str, phase: PhaseConfig, trained: set[Role], moe: MoeConfig, injection: InjectionConfig
) -> list[str]:
    has_loss = moe.load_balance.type in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv)
    routers = STRATEGIES[injection.strategy].any_routers
    on_by_default = phase.auxiliary_loss is not False
    acts = {
        "aux_loss_coef": (has_loss, f"with moe.load_balance.type={moe.load_balance.type}", phase.load_balance),
        "router_z_loss_coef": (trains_logits(moe), f"with moe.router={moe.router}", phase.router_z_loss),
    }
    problems = []
    for name, (possible, why, switch) in acts.items():
        value = getattr(phase, name)
        if value is None:
            continue
        if value < 0:
            problems.append(f"{key}.{name} is {value}, must be at least 0")
        elif not routers:
            problems.append(
                without_effect(f"{key}.{name}", f"with injection={injection.strategy}, which has no routers")
            )
        elif not possible:
            problems.append(without_effect(f"{key}.{name}", why))
        elif switch is False or (switch is None and not on_by_default):
            problems.append(without_effect(f"{key}.{name}", "in a phase that switches this loss off"))
        elif switch is None and phase.auxiliary_loss is None and Role.router not in trained:
            problems.append(
                without_effect(f"{key}.{name}", "in a phase that trains no routers and does not set auxiliary_loss")
            )
    return problems


def _target_problems(key: str, phase: PhaseConfig, trained: set[Role], config: RunConfig) -> list[str]:
    moe, coef, problems = config.moe, phase.router_target_coef, []
    by_target = phase.route_by is RouteBy.target
    every = phase.router_every_n_steps
    if every < 1:
        problems += at_least(every, 1, f"{key}.router_every_n_steps")
    elif every > 1:
        problems += _resting_problems(f"{key}.router_every_n_steps", trained, moe, by_target=by_target)
    if moe.router_target is RouterTarget.none:
        why = "with moe.router_target=none; set moe.router_target=auto, domain or cluster"
        problems += [without_effect(f"{key}.router_target_coef", why)] if coef is not None else []
        problems += [without_effect(f"{key}.route_by=target", why)] if by_target else []
        return problems
    if coef is not None and coef < 0:
        problems.append(f"{key}.router_target_coef is {coef}, must be at least 0")
    elif coef and Role.router not in trained:
        problems.append(
            without_effect(f"{key}.router_target_coef", "in a phase that trains no routers; add router to trainable")
        )
    if by_target and phase.expert_dropout:
        why = f"with {key}.route_by=target, where no expert is dropped"
        problems.append(without_effect(f"{key}.expert_dropout=true", why))
    idle = moe.load_balance.type is not LoadBalanceType.none and not balances_by_target(
        moe, config.injection, config.data
    )
    if by_target and idle and config.resume is None:
        why = f"with {key}.route_by=target, {LOAD_OF_ROWS}"
        given = {"load_balance=true": phase.load_balance, "aux_loss_coef": phase.aux_loss_coef}
        problems += [without_effect(f"{key}.{name}", why) for name, value in given.items() if value]
    if by_target and moe.router is not None and ROUTERS[moe.router].l1:
        problems.append(
            f"{key}.route_by=target cannot act on moe.router={moe.router}, whose logits are weights that may be 0 for "
            "the expert of the target; use route_by=router, or another router"
        )
    return problems


def _resting_problems(key: str, trained: set[Role], moe: MoeConfig, *, by_target: bool) -> list[str]:
    """Problems of routers that do not learn at each step."""
    if not by_target:
        return [without_effect(key, "with route_by=router, by whose decision experts train at each step; leave it out")]
    if not reads_prompts_first(moe):
        why = f"with moe.router={moe.router} and moe.router_scope={moe.router_scope}, which read no prompts first"
        return [without_effect(key, why)]
    return [] if Role.router in trained else [without_effect(key, "in a phase that trains no routers")]


def _share_experts(some: list[int] | None, others: list[int] | None) -> bool:
    return some is None or others is None or bool(set(some) & set(others))


def _handoff_problems(
    key: str, handoff: HandoffConfig, trained: set[Role], steps: int | None, injection: InjectionConfig
) -> list[str]:
    if handoff.role is None:
        return [
            without_effect(f"{key}.{name}", f"without {key}.role") for name in changed_keys(handoff, HandoffConfig())
        ]
    problems = []
    if handoff.role not in (Role.lora, Role.attn_lora):
        problems.append(f"{key}.role is {handoff.role}; allowed: lora, attn_lora")
    elif handoff.role is Role.attn_lora and not injection.attn_lora.enabled:
        problems.append(without_effect(f"{key}.role=attn_lora", "with injection.attn_lora.enabled=false"))
    if Role.base_ffn not in trained:
        problems.append(f"{key} hands over to base_ffn, which does not train in this phase; add it to trainable")
    if not 0 <= handoff.end_scale < 1:
        problems.append(f"{key}.end_scale is {handoff.end_scale}, must be at least 0 and below 1")
    try:
        if start_step(handoff.steps, 100) < 1:
            problems.append(f"{key}.steps is {handoff.steps}, must be above 0")
        elif steps is not None and start_step(handoff.steps, steps) > steps:
            problems.append(f"{key}.steps is {handoff.steps}, beyond the {steps} steps of the phase: it would not end")
    except ValueError as error:
        problems.append(f"{key}.steps: {error}")
    if handoff.experts is not None:
        most = injection.most_experts
        own = STRATEGIES[injection.strategy].own_routers
        wrong = [expert for expert in handoff.experts if not 0 <= expert < most]
        if handoff.role is not Role.lora:
            problems.append(without_effect(f"{key}.experts", f"with {key}.role={handoff.role}"))
        elif not STRATEGIES[injection.strategy].any_routers:
            problems.append(without_effect(f"{key}.experts", f"with injection={injection.strategy}"))
        elif not handoff.experts or (own and wrong):
            problems.append(f"{key}.experts is {handoff.experts}; allowed: numbers from 0 to {most - 1}")
    return problems
