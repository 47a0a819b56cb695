"""Every cross-field problem of a config at once."""

import re
from dataclasses import replace
from pathlib import Path

from lmoe.config.analysis import AnalysisConfig
from lmoe.config.checkpoint import CheckpointConfig
from lmoe.config.data import BUNDLED_FOLDERS
from lmoe.config.injection import InjectionConfig
from lmoe.config.limits import LARGEST_OF_OTHER_KEYS, MOST_ROWS_OF_A_STEP
from lmoe.config.logger import LoggerConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.optim import OptimConfig, RoleOptimConfig
from lmoe.config.problems import above_zero, at_least, keys_named, raise_problems, within_sizes, without_effect
from lmoe.config.read import independent
from lmoe.config.run import RunConfig
from lmoe.config.trainer import PRECISIONS, TrainerConfig, max_seconds
from lmoe.files.places import blocked_folder, exists, expanded, hub_note, missing_place
from lmoe.files.resources import BASES
from lmoe.files.run_folder import name_problems
from lmoe.rules.backbone import backbone_problems
from lmoe.rules.callbacks import callback_problems, callbacks_from_problems
from lmoe.rules.data import cluster_problems, data_problems
from lmoe.rules.experts_from import expert_places, without_source
from lmoe.rules.injection import injection_problems
from lmoe.rules.lessons import lesson_batch_sizes, lesson_places, lesson_problems
from lmoe.rules.moe import idle_dropout_problems, moe_problems
from lmoe.rules.phase_options import ALWAYS_BY_TARGET, always_by_target, schedule_problems
from lmoe.rules.phases import TRAINABLE, has_reward_head, phase_problems, present_roles, trained_base
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import QUANTISED, Accelerator, Backend, DryRun, KnockOut, LoggerKind, Role, Strategy, WandbMode

NOT_IN_PROJECT = "/\\#?%:"
LONGEST_NAME, LONGEST_TAG = 128, 64


def validate(config: RunConfig) -> None:
    """Refuse a config with any problem.

    Raises:
        ConfigError: with every problem of the config.
    """
    raise_problems(run_problems(config))


def run_problems(config: RunConfig) -> list[str]:
    """Every problem of the config, as text."""
    sizes, config = within_sizes(config)
    epochs, config = epoch_problems(config)
    if config.resume is not None:  # what the experts were at first is in its checkpoint
        config = replace(config, injection=without_source(config.injection))
    return sizes + independent(
        epochs
        + injection_problems(config.injection, config.moe)
        + moe_problems(config.moe, config.injection)
        + ([] if config.resume is not None else idle_dropout_problems(config.moe, config.injection))
        + phase_problems(config)
        + backbone_problems(config.backbone)
        + data_problems(config.data)
        + lesson_problems(config)
        + cluster_problems(config.data, config.moe, config.injection)
        + optim_problems(config.optim)
        + schedule_problems(config)
        + trainer_problems(config.trainer)
        + logger_problems(config.logger)
        + sharding_problems(config)
        + backend_problems(config)
        + compile_problems(config)
        + callback_problems(config)
        + callbacks_from_problems(config)
        + _idle_problems(config)
        + at_least(config.analysis.permutations, 1, "analysis.permutations")
        + checkpoint_problems(config.checkpoint, config.resume)
        + seed_problems(config.seed)
        + name_problems(config.name)
        + step_problems("data.batch_size", config.data.batch_size, config.trainer)
        + [
            problem
            for key, rows in lesson_batch_sizes(config).items()
            for problem in step_problems(key, rows, config.trainer)
        ]
        + place_problems(config),
        keys_named(sizes),
    )


def epoch_problems(config: RunConfig) -> tuple[list[str], RunConfig]:
    """Problems of trainer.max_epochs, and the config to look at: until rows are read, its run is as long as any."""
    trainer = config.trainer
    if has_length(config):
        return [], config
    assert trainer.max_epochs is not None
    problems = above_zero(trainer.max_epochs, "trainer.max_epochs")
    if trainer.max_steps != TrainerConfig().max_steps:
        problems.append(
            f"trainer.max_epochs={trainer.max_epochs:g} and trainer.max_steps={trainer.max_steps} are both set; give "
            "one of them"
        )
    if config.data.streaming:
        problems.append("trainer.max_epochs: how many rows a stream has is not known; give trainer.max_steps")
    return problems, replace(config, trainer=replace(trainer, max_steps=LARGEST_OF_OTHER_KEYS))


def has_length(config: RunConfig) -> bool:
    """Whether trainer.max_steps is how long the run is: without trainer.max_epochs, or of a run that goes on and has
    recorded what was worked out from it.

    NOTE a run that was ended before its rows were read has not.
    """
    trainer = config.trainer
    return trainer.max_epochs is None or (config.resume is not None and trainer.max_steps != TrainerConfig().max_steps)


def section_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Every problem of the two sections that say what is put into a backbone."""
    of_injection, injection = within_sizes(injection, "injection")
    of_moe, moe = within_sizes(moe, "moe")
    sizes = of_injection + of_moe
    return sizes + independent(injection_problems(injection, moe) + moe_problems(moe, injection), keys_named(sizes))


def step_problems(rows_key: str, rows: int, trainer: TrainerConfig) -> list[str]:
    """The problem of an optimizer step that takes more rows than it could ever see."""
    batches = trainer.accumulate_grad_batches
    if rows * batches <= MOST_ROWS_OF_A_STEP:
        return []
    return [
        f"{rows_key}={rows} times trainer.accumulate_grad_batches={batches} makes a step of {rows * batches} rows, "
        f"must be at most {MOST_ROWS_OF_A_STEP}; lower one of them"
    ]


PLACES = {
    "backbone.model_name": tuple(BASES),
    "data.path": tuple(BUNDLED_FOLDERS),
    "data.val_path": tuple(BUNDLED_FOLDERS),
    "data.judge_path": tuple(BUNDLED_FOLDERS),
}
"""Keys that name a local path or something on the hub, and what else each may say."""


def place_problems(config: RunConfig) -> list[str]:
    """Local paths of a config that are not there, or that something else is in the way of."""
    problems = [
        problem for key, value in _places(config).items() for problem in missing_place(key, value, names=_names(key))
    ]
    return problems + blocked_folder("data.cache_dir", config.data.cache_dir)


def hub_names(config: RunConfig) -> list[str]:
    """One line for each setting of a valid config that is taken for a name on the hub."""
    return [note for key, value in _places(config).items() for note in hub_note(key, value, names=_names(key))]


def _names(key: str) -> tuple[str, ...]:
    """What a key may say that is neither a path nor a name on the hub."""
    if key.startswith("data.sources.") or (key.startswith("phase.") and key.endswith("path")):
        return tuple(BUNDLED_FOLDERS)
    return PLACES.get(key, ())


def _places(config: RunConfig) -> dict[str, str | None]:
    places: dict[str, str | None] = {"backbone.model_name": config.backbone.model_name}
    if config.dry_run not in (DryRun.estimate, DryRun.preflight):  # of a config alone, whose rows may be elsewhere
        places |= {"data.val_path": config.data.val_path, "data.judge_path": config.data.judge_path}
        places |= {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
        places |= {} if config.data.sources else {"data.path": config.data.path}
        places |= lesson_places(config)
    if config.resume is None:  # a run that goes on has its experts in its checkpoint
        places |= expert_places(config.injection)
    return places


ANNEAL_STEPS = re.compile(r"\d{1,18}", re.ASCII)


def _idle_problems(config: RunConfig) -> list[str]:
    """Settings of other sections that this run has no use for."""
    problems = []
    strategy = config.injection.strategy
    if not STRATEGIES[strategy].any_routers:
        changed = {
            "trainer.stop_on_collapse": config.trainer.stop_on_collapse,
            "logger.samples": config.logger.samples and config.logger.kind is LoggerKind.wandb,
            "analysis.knock_out": config.analysis.knock_out is not KnockOut.none,
            "analysis.permutations": config.analysis.permutations != AnalysisConfig().permutations,
        }
        why = f"with injection={strategy}, which has no routers"
        problems += [without_effect(key, why) for key, given in changed.items() if given]
    elif config.trainer.stop_on_collapse and Role.router not in present_roles(config.injection, config.moe):
        problems.append(
            without_effect("trainer.stop_on_collapse", f"with moe.router={config.moe.router}, which learns nothing")
        )
    elif config.trainer.stop_on_collapse and config.phase.phases and always_by_target(config.phase.phases.values()):
        why = f"{ALWAYS_BY_TARGET}, and the rows say how much each expert gets"
        problems.append(without_effect("trainer.stop_on_collapse", why))
    trained = {role.value for phase in config.phase.phases.values() for role in phase.trainable}
    steps, anneal = config.trainer.max_steps, config.moe.anneal_steps
    if anneal is not None and ANNEAL_STEPS.fullmatch(anneal.strip()) and int(anneal) > steps >= 1:
        problems.append(
            f"moe.anneal_steps={anneal} is beyond trainer.max_steps={steps}: the ends would not be reached; lower it"
        )
    if config.optim.lora_plus_ratio != 1 and not trained & {Role.lora.value, Role.attn_lora.value}:
        problems.append(without_effect("optim.lora_plus_ratio", "where neither lora nor attn_lora trains"))
    trained &= {role.value for role in present_roles(config.injection, config.moe)}
    if has_reward_head(config):
        trained.add(Role.reward_head.value)
    elif config.optim.roles.get(Role.reward_head, RoleOptimConfig()) != RoleOptimConfig():
        problems.append(without_effect("optim.roles.reward_head", "where no phase has task.name=reward"))
        trained.add(Role.reward_head.value)
    problems += [
        f"optim.roles.{role} has no effect: {role} trains in no phase; leave it out or add it to a phase"
        for role, settings in config.optim.roles.items()
        if role in {r.value for r in TRAINABLE} - trained and settings != RoleOptimConfig()
    ]
    return problems


def seed_problems(seed: int) -> list[str]:
    """What is wrong with the value of `seed`."""
    return [] if 0 <= seed < 2**32 else [f"seed is {seed}, must be from 0 to {2**32 - 1}"]


def optim_problems(optim: OptimConfig) -> list[str]:
    """What is wrong in the section `optim`."""
    problems = at_least(optim.warmup_steps, 0, "optim.warmup_steps") + above_zero(optim.eps, "optim.eps")
    if optim.lr <= 0:
        problems.append(f"optim.lr is {optim.lr}, must be above 0")
    if optim.weight_decay < 0:
        problems.append(f"optim.weight_decay is {optim.weight_decay}, must be at least 0")
    if optim.lora_plus_ratio < 1:
        problems.append(f"optim.lora_plus_ratio is {optim.lora_plus_ratio}, must be at least 1 (1: off)")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas is {optim.betas}, must be two numbers from 0 to below 1")
    if not 0 <= optim.min_lr_ratio <= 1:
        problems.append(f"optim.min_lr_ratio is {optim.min_lr_ratio}, must be from 0 to 1")
    for role, settings in optim.roles.items():
        if role not in {r.value for r in TRAINABLE}:
            problems.append(f"optim.roles.{role}: no such trainable role; allowed: {', '.join(TRAINABLE)}")
        if settings.lr is not None and settings.lr <= 0:
            problems.append(f"optim.roles.{role}.lr is {settings.lr}, must be above 0")
        if settings.weight_decay is not None and settings.weight_decay < 0:
            problems.append(f"optim.roles.{role}.weight_decay is {settings.weight_decay}, must be at least 0")
    return problems


def trainer_problems(trainer: TrainerConfig) -> list[str]:
    """What is wrong in the section `trainer`."""
    problems = (
        at_least(trainer.max_steps, 1, "trainer.max_steps")
        + at_least(trainer.accumulate_grad_batches, 1, "trainer.accumulate_grad_batches")
        + at_least(trainer.devices, 1, "trainer.devices")
        + at_least(trainer.num_nodes, 1, "trainer.num_nodes")
        + device_id_problems(trainer)
        + at_least(trainer.val_every_n_steps, 0, "trainer.val_every_n_steps")
        + at_least(trainer.log_every_n_steps, 1, "trainer.log_every_n_steps")
    )
    if trainer.gradient_clip_val < 0:
        problems.append(f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, must be at least 0 (0: off)")
    if trainer.precision not in PRECISIONS:
        problems.append(f"trainer.precision is {trainer.precision!r}; allowed: {', '.join(PRECISIONS)}")
    if trainer.precision == "16-mixed" and trainer.accelerator is Accelerator.cpu:
        problems.append("trainer.precision=16-mixed needs a GPU; use bf16-mixed or 32-true on the CPU")
    try:
        max_seconds(trainer.max_time)
    except ValueError as error:
        problems.append(f"trainer.max_time: {error}")
    if trainer.strategy is Strategy.auto and trainer.processes > 1:
        problems.append(
            f"trainer.devices={trainer.devices}, num_nodes={trainer.num_nodes}: several devices need trainer=ddp, "
            "fsdp2 or device_map"
        )
    if trainer.strategy is Strategy.device_map:
        problems += device_map_problems(trainer)
    if trainer.strategy is Strategy.deepspeed:
        problems.append(
            "trainer.strategy=deepspeed: DeepSpeed is told only at its start which parameters train, so phases cannot "
            "change them; use trainer=ddp, or trainer=fsdp2 where the backbone does not fit one device"
        )
    return problems


def device_map_problems(trainer: TrainerConfig) -> list[str]:
    """What one process cannot do whose layers lie on several GPUs."""
    problems = []
    if trainer.num_nodes > 1:
        problems.append(
            f"trainer.strategy=device_map is one process, and trainer.num_nodes={trainer.num_nodes}; use trainer=fsdp2"
        )
    if trainer.accelerator is Accelerator.cpu and trainer.devices > 1:
        problems.append(
            f"trainer.strategy=device_map puts layers onto GPUs, and trainer.accelerator=cpu; leave trainer.devices="
            f"{trainer.devices} out, or use trainer.accelerator=gpu"
        )
    if trainer.compile and trainer.devices > 1:
        problems.append("trainer.compile=true is not for trainer.strategy=device_map; set either to its default")
    return problems


def device_id_problems(trainer: TrainerConfig) -> list[str]:
    """What is wrong with the value of `trainer.device_ids`."""
    ids = trainer.device_ids
    if ids is None:
        return []
    problems = []
    if trainer.accelerator is Accelerator.cpu:
        problems.append(without_effect("trainer.device_ids", "with trainer.accelerator=cpu, which has no numbers"))
    if len(ids) != trainer.devices or len(set(ids)) != len(ids) or any(number < 0 for number in ids):
        problems.append(
            f"trainer.device_ids is {ids}, must name as many different GPUs as trainer.devices={trainer.devices}, "
            "counted from 0"
        )
    return problems


def backend_problems(config: RunConfig) -> list[str]:
    """A backend that computes on a GPU alone, in a run that has said it wants none."""
    if config.moe.backend is not Backend.triton or config.trainer.accelerator is not Accelerator.cpu:
        return []
    return ["moe.backend=triton computes on a GPU, and trainer.accelerator=cpu; use moe.backend=auto, or trainer=gpu"]


def compile_problems(config: RunConfig) -> list[str]:
    """What no compiler takes: quantised matmuls, whose code computes something else then, and Triton's experts."""
    if not config.trainer.compile:
        return []
    problems = []
    if (precision := config.backbone.precision) in QUANTISED:
        problems.append(
            f"trainer.compile=true is not for backbone.precision={precision}, whose matmuls give other numbers under a "
            "compiler: set trainer.compile=false, or backbone.precision=bfloat16"
        )
    if config.moe.backend is Backend.triton:
        problems.append("trainer.compile=true is not for moe.backend=triton: set either to its default")
    return problems


def sharding_problems(config: RunConfig) -> list[str]:
    """What trainer.strategy=fsdp2 cannot do."""
    if config.trainer.strategy is not Strategy.fsdp2:
        return []
    problems = []
    if roles := sorted(trained_base(config)):
        problems.append(
            f"trainer.strategy=fsdp2 shards the backbone as frozen, so {', '.join(roles)} cannot train; use trainer=ddp"
        )
    if config.backbone.precision in QUANTISED:
        problems.append(
            f"trainer.strategy=fsdp2 cannot shard backbone.precision={config.backbone.precision}; use bfloat16, or one "
            "device with trainer.strategy=auto"
        )
    if config.checkpoint.save_base:
        problems.append("checkpoint.save_base=true cannot gather a backbone that trainer.strategy=fsdp2 has sharded")
    if config.trainer.precision == "16-mixed":
        problems.append("trainer.precision=16-mixed does not work with trainer.strategy=fsdp2; use bf16-mixed")
    return problems


def checkpoint_problems(checkpoint: CheckpointConfig, resume: str | None) -> list[str]:
    """What is wrong in the section `checkpoint`."""
    problems = at_least(checkpoint.every_n_steps, 0, "checkpoint.every_n_steps")
    problems += at_least(checkpoint.keep_last, 1, "checkpoint.keep_last")
    name = checkpoint.resume_from
    if name is not None and resume is None:
        problems.append(without_effect("checkpoint.resume_from", "in a new run, without resume"))
    if name is not None and (Path(name).name != name or not name.endswith(".ckpt")):
        problems.append(f"checkpoint.resume_from={name}: must be the name of a file in checkpoints/, such as best.ckpt")
    elif name is not None and resume is not None and not exists(expanded(resume) / "checkpoints" / name):
        problems.append(f"checkpoint.resume_from={name}: no such file in {resume}/checkpoints")
    return problems


def logger_problems(logger: LoggerConfig) -> list[str]:
    """What is wrong in the section `logger`."""
    default = LoggerConfig()
    if logger.kind is LoggerKind.wandb:
        return wandb_name_problems(logger)
    changed = [
        name
        for name, value, usual in (
            ("mode", logger.mode, WandbMode.auto),
            ("project", logger.project, default.project),
            ("entity", logger.entity, None),
            ("group", logger.group, None),
            ("tags", logger.tags, []),
            ("job_type", logger.job_type, None),
            ("notes", logger.notes, None),
            ("samples", logger.samples, False),
            ("artifact", logger.artifact, False),
        )
        if value != usual
    ]
    return [
        f"logger.{name} has no effect with logger={logger.kind}; leave it out or use logger=wandb" for name in changed
    ]


def wandb_name_problems(logger: LoggerConfig) -> list[str]:
    """Names that W&B refuses when a run starts (its SDK's validation of project and tags)."""
    problems = []
    named = {
        "project": logger.project,
        "entity": logger.entity,
        "group": logger.group,
        "job_type": logger.job_type,
    }
    for name, value in named.items():
        if value is not None and not value.strip():
            problems.append(f"logger.{name} is empty; name one{'' if name == 'project' else ', or leave it at null'}")
        elif value is not None and len(value) > LONGEST_NAME:
            problems.append(f"logger.{name} has {len(value)} characters; W&B takes at most {LONGEST_NAME}")
    if bad := [letter for letter in NOT_IN_PROJECT if letter in logger.project]:
        problems.append(
            f"logger.project={logger.project}: W&B takes no {' '.join(bad)} in the name of a project; none of "
            f"{' '.join(NOT_IN_PROJECT)} may be in it"
        )
    problems += [
        f"logger.tags[{number}] has {len(tag)} characters; W&B takes 1 to {LONGEST_TAG}"
        for number, tag in enumerate(logger.tags)
        if not 1 <= len(tag) <= LONGEST_TAG
    ]
    return problems
