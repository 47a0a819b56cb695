"""Every cross-field problem of a config at once."""

from pathlib import Path

from lmoe.errors import ConfigError
from lmoe.schema.backbone import BackboneConfig
from lmoe.schema.data import DataConfig
from lmoe.schema.injection import InjectionConfig
from lmoe.schema.logger import LoggerConfig, LoggerKind, WandbMode
from lmoe.schema.moe import LoadBalanceType, MoeConfig, RouterKind
from lmoe.schema.optim import LrSchedule, OptimConfig, RoleOptimConfig
from lmoe.schema.phase import Role
from lmoe.schema.phase_rules import TRAINABLE, phase_problems
from lmoe.schema.run import RunConfig
from lmoe.schema.trainer import PRECISIONS, Accelerator, Strategy, TrainerConfig

DEFAULT_AUX_LOSS_COEF = 0.01
CALLBACK_PREFIX = "lightning.pytorch.callbacks."


def raise_problems(problems: list[str]) -> None:
    """
    Raises:
        ConfigError: if there is any problem; its message lists them all.
    """
    if problems:
        raise ConfigError(problems)


def validate(config: RunConfig) -> None:
    """
    Raises:
        ConfigError: with every problem of the config.
    """
    raise_problems(
        injection_problems(config.injection, config.moe)
        + moe_problems(config.moe)
        + phase_problems(config)
        + backbone_problems(config.backbone)
        + data_problems(config.data)
        + optim_problems(config.optim)
        + trainer_problems(config.trainer)
        + logger_problems(config.logger)
        + _callback_problems(config)
        + _idle_problems(config)
        + at_least(config.checkpoint.every_n_steps, 0, "checkpoint.every_n_steps")
        + seed_problems(config.seed)
    )


def _idle_problems(config: RunConfig) -> list[str]:
    """Settings of other sections that this run has no use for."""
    problems = []
    if config.trainer.compile:
        problems.append("trainer.compile has no effect in train (only in pretrain); leave it out")
    trained = {role.value for phase in config.phase.phases.values() for role in phase.trainable}
    if not config.injection.attn_lora.enabled:
        trained.discard(Role.attn_lora.value)
    problems += [
        f"optim.roles.{role} has no effect: {role} trains in no phase; leave it out or add it to a phase"
        for role, settings in config.optim.roles.items()
        if role in {r.value for r in TRAINABLE} - trained and settings != RoleOptimConfig()
    ]
    return problems


def seed_problems(seed: int) -> list[str]:
    """Problems of `seed`."""
    return [] if 0 <= seed < 2**32 else [f"seed is {seed}, must be from 0 to {2**32 - 1}"]


def injection_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Problems of `injection`, some of which depend on the router."""
    default = InjectionConfig()
    experts = injection.num_experts_by_layer or [injection.num_experts]
    fewest = min(experts)
    problems = (
        at_least(injection.lora_r, 1, "injection.lora_r")
        + at_least(injection.num_experts, 1, "injection.num_experts")
        + at_least(injection.top_k, 1, "injection.top_k")
        + at_least(injection.start_layer, 0, "injection.start_layer")
        + at_least(injection.num_layers, 0, "injection.num_layers")
    )
    if injection.lora_alpha <= 0:
        problems.append(f"injection.lora_alpha is {injection.lora_alpha}, must be above 0")
    if not 0 <= injection.lora_dropout < 1:
        problems.append(f"injection.lora_dropout is {injection.lora_dropout}, must be from 0 to below 1")
    if injection.lora_B_std is not None and injection.lora_B_std < 0:
        problems.append(f"injection.lora_B_std is {injection.lora_B_std}, must be null or at least 0")
    for name, values in (
        ("num_experts_by_layer", injection.num_experts_by_layer),
        ("lora_r_by_layer", injection.lora_r_by_layer),
    ):
        if values is not None and (not values or min(values) < 1):
            problems.append(f"injection.{name} is {values}, must be null or a list of numbers of at least 1")
    if injection.target_keywords == []:
        problems.append("injection.target_keywords is empty; name Linears, or null for every FFN Linear of the family")
    if moe.router is RouterKind.top_k and injection.top_k > fewest >= 1:
        problems.append(
            f"injection.top_k is {injection.top_k}, more than the {fewest} experts of a site; "
            f"lower it or raise injection.num_experts"
        )
    if injection.num_experts_by_layer and injection.num_experts != default.num_experts:
        problems.append(
            "injection.num_experts has no effect beside injection.num_experts_by_layer; leave one of them out"
        )
    if moe.router is RouterKind.soft and injection.top_k != default.top_k:
        problems.append("injection.top_k has no effect with moe.router=soft, which uses every expert; leave it out")
    if moe.router is RouterKind.top_k and injection.top_k == 1 and moe.norm_topk_prob:
        problems.append(
            "moe.norm_topk_prob=true with injection.top_k=1 makes every weight 1 and gives the router no gradient; "
            "set it to null or false, or top_k to at least 2"
        )
    return problems + _attn_lora_problems(injection)


def _attn_lora_problems(injection: InjectionConfig) -> list[str]:
    attention = injection.attn_lora
    given = {
        "keywords": attention.keywords,
        "lora_r": attention.lora_r,
        "lora_alpha": attention.lora_alpha,
    }
    problems = []
    if not attention.enabled:
        problems += [
            f"injection.attn_lora.{name} has no effect with injection.attn_lora.enabled=false; leave it out"
            for name, value in given.items()
            if value is not None
        ]
    if attention.keywords == []:
        problems.append("injection.attn_lora.keywords is empty; set injection.attn_lora.enabled=false instead")
    if attention.lora_r is not None:
        problems += at_least(attention.lora_r, 1, "injection.attn_lora.lora_r")
    if attention.lora_alpha is not None and attention.lora_alpha <= 0:
        problems.append(f"injection.attn_lora.lora_alpha is {attention.lora_alpha}, must be above 0")
    return problems


def moe_problems(moe: MoeConfig) -> list[str]:
    """Problems of `moe`, missing parts first."""
    balance = moe.load_balance
    problems = []
    if moe.router is None:
        problems.append(f"moe.router is required: {' or '.join(RouterKind)}")
    if moe.router_z_loss_coef is None:
        problems.append("moe.router_z_loss_coef is required: a number, 0 switches the z-loss off (usual: 0.001)")
    elif moe.router_z_loss_coef < 0:
        problems.append(f"moe.router_z_loss_coef is {moe.router_z_loss_coef}, must be at least 0")
    if balance.type is None:
        problems.append(f"moe.load_balance.type is required: {' or '.join(LoadBalanceType)}")
    if balance.type is LoadBalanceType.aux_loss and balance.aux_loss_coef is None:
        problems.append("moe.load_balance.aux_loss_coef is required with type=aux_loss (usual: 0.01)")
    if balance.aux_loss_coef is not None and balance.aux_loss_coef < 0:
        problems.append(f"moe.load_balance.aux_loss_coef is {balance.aux_loss_coef}, must be at least 0")
    if balance.type is LoadBalanceType.none and balance.aux_loss_coef not in (None, 0, DEFAULT_AUX_LOSS_COEF):
        problems.append(
            "moe.load_balance.aux_loss_coef has no effect with type=none; leave it out or use type=aux_loss"
        )
    if moe.temperature <= 0:
        problems.append(f"moe.temperature is {moe.temperature}, must be above 0")
    if moe.router is RouterKind.soft and moe.norm_topk_prob is not None:
        problems.append("moe.norm_topk_prob has no effect with moe.router=soft, whose weights sum to 1; leave it out")
    return problems


def backbone_problems(backbone: BackboneConfig) -> list[str]:
    """Problems of `backbone` that show without loading it."""
    if backbone.model_name:
        return []
    return ["backbone.model_name is required: a hub name, a local directory, or tiny"]


def data_problems(data: DataConfig) -> list[str]:
    """Problems of `data` that show without reading it."""
    problems = (
        at_least(data.max_length, 2, "data.max_length")
        + at_least(data.batch_size, 1, "data.batch_size")
        + at_least(data.num_workers, 0, "data.num_workers")
        + at_least(data.val_rows_per_domain, 0, "data.val_rows_per_domain")
    )
    if not data.path:
        problems.append("data.path is required: a JSONL file, a folder of them, a hub data set, or bundled")
    if not 0 < data.val_fraction < 1:
        problems.append(f"data.val_fraction is {data.val_fraction}, must be above 0 and below 1")
    if (data.val_path or data.path == "bundled") and data.val_fraction != DataConfig().val_fraction:
        problems.append("data.val_fraction has no effect where validation rows are given; leave it out")
    if data.chat_template and not Path(data.chat_template).expanduser().is_file():
        problems.append(f"data.chat_template={data.chat_template}: no such file")
    return problems


def optim_problems(optim: OptimConfig) -> list[str]:
    """Problems of `optim`."""
    problems = at_least(optim.warmup_steps, 0, "optim.warmup_steps")
    if optim.lr <= 0:
        problems.append(f"optim.lr is {optim.lr}, must be above 0")
    if optim.weight_decay < 0:
        problems.append(f"optim.weight_decay is {optim.weight_decay}, must be at least 0")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas is {optim.betas}, must be two numbers from 0 to below 1")
    if not 0 <= optim.min_lr_ratio <= 1:
        problems.append(f"optim.min_lr_ratio is {optim.min_lr_ratio}, must be from 0 to 1")
    if optim.schedule is LrSchedule.constant and optim.min_lr_ratio:
        problems.append("optim.min_lr_ratio has no effect with optim.schedule=constant; leave it out")
    for role, settings in optim.roles.items():
        if role not in {r.value for r in TRAINABLE}:
            problems.append(f"optim.roles.{role}: no such trainable role; allowed: {', '.join(TRAINABLE)}")
        if settings.lr is not None and settings.lr <= 0:
            problems.append(f"optim.roles.{role}.lr is {settings.lr}, must be above 0")
        if settings.weight_decay is not None and settings.weight_decay < 0:
            problems.append(f"optim.roles.{role}.weight_decay is {settings.weight_decay}, must be at least 0")
    return problems


def trainer_problems(trainer: TrainerConfig) -> list[str]:
    """Problems of `trainer`."""
    problems = (
        at_least(trainer.max_steps, 1, "trainer.max_steps")
        + at_least(trainer.accumulate_grad_batches, 1, "trainer.accumulate_grad_batches")
        + at_least(trainer.devices, 1, "trainer.devices")
        + at_least(trainer.num_nodes, 1, "trainer.num_nodes")
        + at_least(trainer.val_every_n_steps, 0, "trainer.val_every_n_steps")
        + at_least(trainer.log_every_n_steps, 1, "trainer.log_every_n_steps")
    )
    if trainer.gradient_clip_val < 0:
        problems.append(f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, must be at least 0 (0: off)")
    if trainer.precision not in PRECISIONS:
        problems.append(f"trainer.precision is {trainer.precision!r}; allowed: {', '.join(PRECISIONS)}")
    if trainer.precision == "16-mixed" and trainer.accelerator is Accelerator.cpu:
        problems.append("trainer.precision=16-mixed needs a GPU; use bf16-mixed or 32-true on the CPU")
    if trainer.strategy is Strategy.auto and trainer.devices * trainer.num_nodes > 1:
        problems.append("several devices need trainer=ddp (or trainer.strategy=ddp)")
    return problems


def logger_problems(logger: LoggerConfig) -> list[str]:
    """Problems of `logger`."""
    default = LoggerConfig()
    if logger.kind is LoggerKind.wandb:
        return []
    changed = [
        name
        for name, value, usual in (
            ("mode", logger.mode, WandbMode.auto),
            ("project", logger.project, default.project),
            ("entity", logger.entity, None),
            ("group", logger.group, None),
            ("tags", logger.tags, []),
        )
        if value != usual
    ]
    return [
        f"logger.{name} has no effect with logger={logger.kind}; leave it out or use logger=wandb" for name in changed
    ]


def _callback_problems(config: RunConfig) -> list[str]:
    problems = []
    for name, settings in config.callbacks.items():
        target = settings.get("_target_") if isinstance(settings, dict) else None
        if not isinstance(target, str) or not target.startswith(CALLBACK_PREFIX):
            problems.append(f"callbacks.{name}._target_ is {target!r}; allowed: {CALLBACK_PREFIX}<class>")
    return problems


def at_least(value: float, least: float, key: str) -> list[str]:
    """One problem if a value is too small."""
    return [] if value >= least else [f"{key} is {value}, must be at least {least}"]
