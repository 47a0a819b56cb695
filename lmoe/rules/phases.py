"""What the phases of a run must satisfy, and what follows from them."""

from dataclasses import replace
from itertools import pairwise

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.phase import PLATEAU, PhaseConfig, planned_start
from lmoe.config.problems import without_effect
from lmoe.config.run import RunConfig
from lmoe.rules.experts_from import base_training_problem, grown_run, source_run, stored_injection
from lmoe.rules.objectives import OBJECTIVES
from lmoe.rules.phase_options import (
    handoff_order_problems,
    idle_by_target_problems,
    option_problems,
    own_rates,
    target_problems,
    untaught,
)
from lmoe.rules.routers import ROUTERS, trains_logits
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import InitLora, LoadBalanceType, PhaseMode, Role

TRAINABLE = (Role.router, Role.lora, Role.attn_lora, Role.base_ffn, Role.head, Role.reward_head)
BASE_ROLES = (Role.base_ffn, Role.head)
"""Parts of the backbone that a phase may train."""
SWITCHES = ("auxiliary_loss", "load_balance", "router_z_loss", "router_noise", "expert_dropout", "diversity")
"""What a phase may switch on of its routers and their experts."""
BREAK_SYMMETRY_STD = 0.01
GROW = "grow"
"""Phase of conf/phase/grow.yaml, which is for new experts alone."""


def ordered_phases(config: RunConfig) -> list[tuple[str, int, PhaseConfig]]:
    """(name, first optimizer step, phase), by start; `trainable` holds all roles of a phase, whatever its mode, and
    reward_head where, and only where, the phase learns by it.

    Raises:
        ValueError: a start that is neither a step nor a share.
    """
    steps = share_base(config)
    entries = [(name, planned_start(phase, steps), phase) for name, phase in config.phase.phases.items()]
    before: list[Role] = []
    resolved = []
    for name, start, phase in sorted(entries, key=lambda entry: entry[1]):
        if phase.mode is PhaseMode.add:
            added = [role for role in phase.trainable if role not in before]
            phase = replace(phase, trainable=[*before, *added], mode=PhaseMode.replace)
        if learns_reward(config, phase) is not (Role.reward_head in phase.trainable):
            own = [role for role in phase.trainable if role is not Role.reward_head]
            phase = replace(phase, trainable=[*own, *([Role.reward_head] if learns_reward(config, phase) else [])])
        before = phase.trainable
        resolved.append((name, start, phase))
    return resolved


def reading_steps(config: RunConfig) -> float:
    """Share of the optimizer steps at which routers that read prompts first do so, as far as rows have targets."""
    entries, total = ordered_phases(config), share_base(config)
    ends = [start for _, start, _ in entries[1:]] + [max(total, entries[-1][1] + 1)]
    spans = [(end - start, phase.router_every_n_steps) for (_, start, phase), end in zip(entries, ends, strict=True)]
    return sum(steps / every for steps, every in spans) / sum(steps for steps, _ in spans)


def base_lr_acts(config: RunConfig) -> bool:
    """Whether anything trains with optim.lr: phases and roles may all have learning rates of their own."""
    return any(
        phase.lr is None and not own_rates(phase.trainable, config.optim) for _, _, phase in ordered_phases(config)
    )


def share_base(config: RunConfig) -> int:
    """Optimizer steps that a share such as 20% is of."""
    return config.trainer.max_steps if config.phase.of_steps is None else config.phase.of_steps


def trained_base(config: RunConfig) -> frozenset[Role]:
    """Roles of the backbone's own parameters that some phase trains."""
    return frozenset(role for phase in config.phase.phases.values() for role in phase.trainable if role in BASE_ROLES)


def learns_reward(config: RunConfig, phase: PhaseConfig) -> bool:
    """Whether a phase learns by a reward head."""
    name = phase.task.get("name", config.task.name)
    return isinstance(name, str) and name in OBJECTIVES and OBJECTIVES[name].reward_head  # type: ignore[index]


def has_reward_head(config: RunConfig) -> bool:
    """Whether some phase learns by a reward head, so that the model is given one."""
    return any(learns_reward(config, phase) for phase in config.phase.phases.values())


def phase_problems(config: RunConfig) -> list[str]:
    """Problems of `phase`, alone and against trainer.max_steps and the injection."""
    problems, laid_out = [], True
    if (of_steps := config.phase.of_steps) is not None and not 1 <= of_steps <= config.trainer.max_steps:
        laid_out = False
        problems.append(f"phase.of_steps is {of_steps}, must be from 1 to trainer.max_steps={config.trainer.max_steps}")
    grown = grown_run(config.injection)
    if grown is not None and (trained := trained_base(config)):
        problems.append(base_training_problem(grown, trained))
    problems += _idle_growth_problems(config)
    for name, phase in config.phase.phases.items():
        key = f"phase.phases.{name}"
        try:
            start = planned_start(phase, share_base(config))
        except ValueError as error:
            laid_out = False
            problems.append(f"{start_key(key, phase)}: {error}")
            continue
        if start >= config.trainer.max_steps:
            laid_out = False
        if start >= config.trainer.max_steps >= 1:
            problems.append(
                f"{start_key(key, phase)} is step {start}, but trainer.max_steps={config.trainer.max_steps} ends the "
                "run before it; start earlier or raise trainer.max_steps"
            )
        problems += _role_problems(key, phase, config)
        problems += _reward_head_problems(key, phase, config)
        problems += _switch_problems(key, phase, config.injection, config.moe)
        if phase.lr is not None and phase.lr <= 0:
            problems.append(f"{key}.lr is {phase.lr}, must be above 0")
        if phase.warmup_steps is not None and phase.warmup_steps < 0:
            problems.append(f"{key}.warmup_steps is {phase.warmup_steps}, must be at least 0")
    if not config.phase.phases:
        problems.append("phase.phases is empty; choose phase=router_warmup or phase=joint, or name phases")
    if not laid_out or not config.phase.phases:  # what follows is about one phase after the other
        return problems
    starts = [(name, start) for name, start, _ in ordered_phases(config)]
    if starts[0][1] != 0:
        problems.append(f"phase.phases.{starts[0][0]}.start is step {starts[0][1]}; the first phase must start at 0")
    if config.phase.phases[starts[0][0]].start == PLATEAU:
        problems.append(f"phase.phases.{starts[0][0]}.start=plateau: the first phase must start at 0")
    ends = [start for _, start in starts[1:]] + [share_base(config)]
    for (name, start, phase), end in zip(ordered_phases(config), ends, strict=True):
        written = config.phase.phases[name]
        steps = None if written.start == PLATEAU else end - start
        problems += option_problems(f"phase.phases.{name}", written, phase.trainable, steps, config)
    problems += target_problems([phase for _, _, phase in ordered_phases(config)], config.moe)
    problems += [] if config.resume is not None else idle_by_target_problems(config)
    problems += handoff_order_problems((f"phase.phases.{name}", config.phase.phases[name]) for name, _ in starts)
    if config.phase.phases[starts[0][0]].mode is PhaseMode.add:
        problems.append(without_effect(f"phase.phases.{starts[0][0]}.mode=add", "in the first phase"))
    for (first, a), (second, b) in pairwise(starts):
        if a == b:
            problems.append(f"phase.phases.{first} and phase.phases.{second} both start at step {a}")
    return problems


def _idle_growth_problems(config: RunConfig) -> list[str]:
    """The problem of phase=grow, which trains what is new, with as many experts as the run has."""
    run, counted = source_run(config.injection), STRATEGIES[config.injection.strategy].adapter_experts
    if run is None or not counted or config.injection.num_experts_by_layer or GROW not in config.phase.phases:
        return []
    count = config.injection.num_experts
    if stored_injection(run).get("num_experts") != count:
        return []
    return [
        f"injection.experts_from={run} has {count} experts, which phase={GROW} is to leave kept as they are, and "
        f"injection.num_experts={count} adds none; set it to at least {count + 1}, or use another phase, such as "
        "phase=joint, to train the old ones on"
    ]


def start_key(key: str, phase: PhaseConfig) -> str:
    """The setting that says when a phase starts, with its value."""
    return f"{key}.plateau.latest={phase.plateau.latest}" if phase.start == PLATEAU else f"{key}.start={phase.start}"


def present_roles(injection: InjectionConfig, moe: MoeConfig) -> list[Role]:
    """Trainable roles with parameters that may train."""
    missing = set()
    if not injection.attn_lora.enabled or grown_run(injection) is not None:  # kept experts rest on it
        missing.add(Role.attn_lora)
    strategy = STRATEGIES[injection.strategy]
    routers_train = ROUTERS[moe.router].trains if strategy.own_routers and moe.router else strategy.any_routers
    if not routers_train:
        missing.add(Role.router)
    if injection.target_keywords == []:
        missing.add(Role.lora)
    return [role for role in TRAINABLE if role not in {*missing, Role.reward_head}]  # which the objective brings


def _reward_head_problems(key: str, phase: PhaseConfig, config: RunConfig) -> list[str]:
    """The problem of a reward head that is to train where nothing is learnt by it."""
    if Role.reward_head not in phase.trainable or learns_reward(config, phase):
        return []
    task = phase.task.get("name", config.task.name)
    return [
        f"{key}.trainable names reward_head, and the phase learns task {task}, which has no use for one; leave it out, "
        f"or set {key}.task.name=reward"
    ]


def _role_problems(key: str, phase: PhaseConfig, config: RunConfig) -> list[str]:
    injection, moe = config.injection, config.moe
    problems = [
        f"{key}.trainable: {role} cannot train with injection={injection.strategy}; allowed: {', '.join(TRAINABLE)}"
        for role in phase.trainable
        if role not in TRAINABLE
    ]
    one_ffn = STRATEGIES[injection.strategy].whole_ffn and injection.share_base
    if Role.base_ffn in phase.trainable and one_ffn:
        problems.append(
            f"{key}.trainable: base_ffn cannot train with injection.share_base=true, where all experts share one FFN; "
            "set injection.share_base=false"
        )
    if phase.mode is PhaseMode.add or (learns_reward(config, phase) and phase.trainable):
        return problems
    if not phase.trainable:
        problems.append(f"{key}.trainable is empty, so the phase trains nothing; allowed: {', '.join(TRAINABLE)}")
    elif not problems and not set(phase.trainable) & set(present_roles(injection, moe)):
        why = {
            Role.attn_lora: _why_no_attn_lora(injection),
            Role.router: f"{_what_has_no_router(injection, moe)}; use phase=joint",
            Role.lora: "injection.target_keywords=[] leaves lora without parameters",
        }
        named = "; ".join(text for role, text in why.items() if role in phase.trainable)
        problems.append(f"{key} trains nothing: {named}")
    return problems


def _why_no_attn_lora(injection: InjectionConfig) -> str:
    if not injection.attn_lora.enabled:
        return "injection.attn_lora.enabled=false leaves attn_lora without parameters"
    return "attn_lora stays as it is, because the experts kept by injection.experts_from rest on it"


def _what_has_no_router(injection: InjectionConfig, moe: MoeConfig) -> str:
    if STRATEGIES[injection.strategy].any_routers:
        return f"moe.router={moe.router} has no parameters"
    return f"injection={injection.strategy} has no routers"


def _switch_problems(key: str, phase: PhaseConfig, injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Switches of a phase for what the strategy or `moe` does not have."""
    if not STRATEGIES[injection.strategy].any_routers:
        return [
            without_effect(f"{key}.{name}=true", f"with injection={injection.strategy}, which has no routers")
            for name in SWITCHES
            if getattr(phase, name)
        ]
    balance = moe.load_balance
    coef = balance.aux_loss_coef if phase.aux_loss_coef is None else phase.aux_loss_coef
    z_coef = moe.router_z_loss_coef if phase.router_z_loss_coef is None else phase.router_z_loss_coef
    by_loss = balance.type is not LoadBalanceType.none and bool(coef)
    by_l1 = moe.router is not None and ROUTERS[moe.router].l1
    balanced = by_l1 or balance.type is LoadBalanceType.aux_loss_free or by_loss
    noisy = moe.router_noise > 0 or bool(moe.router_noise_end)
    have = {
        "load_balance": (phase.load_balance, balanced, f"moe.load_balance.type={balance.type}"),
        "router_z_loss": (
            phase.router_z_loss,
            bool(z_coef) and trains_logits(moe),
            f"moe.router_z_loss_coef={moe.router_z_loss_coef} and moe.router={moe.router}",
        ),
        "router_noise": (phase.router_noise, noisy, "moe.router_noise=0"),
        "expert_dropout": (phase.expert_dropout, moe.expert_dropout > 0, "moe.expert_dropout=0"),
        "diversity": (phase.diversity, moe.diversity_coef > 0, "moe.diversity_coef=0"),
    }
    return [
        without_effect(f"{key}.{name}=true", f"with {why}") for name, (on, has, why) in have.items() if on and not has
    ]


def phase_warnings(config: RunConfig) -> list[str]:
    """What is allowed and perhaps not meant; call on a valid config."""
    phases = ordered_phases(config)
    trained = {role for _, _, phase in phases for role in phase.trainable}
    present, imported = present_roles(config.injection, config.moe), bool(config.injection.experts_from)
    trains_on = source_run(config.injection) is not None and grown_run(config.injection) is None
    warnings = [
        f"role {role} trains in no phase: it stays at its random start; add it to a phase.phases.<name>.trainable"
        for role in present
        if role not in trained and role not in BASE_ROLES and not (role is Role.lora and imported) and not trains_on
    ]
    for name, _, phase in phases:
        if Role.attn_lora in phase.trainable and Role.attn_lora not in present:
            warnings.append(f"phase.phases.{name} names attn_lora, but {_why_no_attn_lora(config.injection)}")
        if Role.router in phase.trainable and Role.router not in present and len(phases) > 1:  # one is all there is
            warnings.append(
                f"phase.phases.{name} names router, but {_what_has_no_router(config.injection, config.moe)}"
            )
    return warnings + untaught([(name, phase) for name, _, phase in phases], config.moe)


def lora_B_std(config: RunConfig) -> float | None:
    """The setting, or its default: 0, or 0.01 where a phase trains routers before experts.

    With all lora_B at zero the experts add nothing, and a router that trains alone gets exactly no task gradient.
    """
    if config.injection.lora_B_std is not None or not STRATEGIES[config.injection.strategy].any_routers:
        return config.injection.lora_B_std
    if config.injection.experts_from:
        return 0.0  # a router between experts that differ has a gradient
    if config.injection.init_lora is InitLora.svd or not STRATEGIES[config.injection.strategy].own_routers:
        return 0.0  # a router of the backbone chooses between experts that differ already
    for _, _, phase in ordered_phases(config):
        if Role.lora in phase.trainable:
            return 0.0
        if Role.router in phase.trainable:
            return BREAK_SYMMETRY_STD
    return 0.0
