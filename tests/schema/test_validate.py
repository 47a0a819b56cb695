"""Every bad value gives one line that names its key, says what was got and what to do; all lines come at once."""

from collections.abc import Callable

import pytest

from lmoe.errors import ConfigError
from lmoe.schema.data import DataConfig
from lmoe.schema.injection import InjectionConfig
from lmoe.schema.keys import unknown_key
from lmoe.schema.logger import LoggerKind, WandbMode
from lmoe.schema.moe import LoadBalanceConfig, LoadBalanceType, MoeConfig, RouterKind
from lmoe.schema.optim import LrSchedule, RoleOptimConfig
from lmoe.schema.phase import PhaseConfig, Role
from lmoe.schema.run import RunConfig
from lmoe.schema.trainer import Accelerator
from lmoe.schema.validate import validate


def valid() -> RunConfig:
    """As conf/train.yaml composes it."""
    config = RunConfig()
    config.moe = MoeConfig(
        router=RouterKind.top_k,
        router_z_loss_coef=0.001,
        load_balance=LoadBalanceConfig(type=LoadBalanceType.aux_loss, aux_loss_coef=0.01),
    )
    config.phase.phases = {
        "router_warmup": PhaseConfig(start="0", trainable=[Role.router]),
        "experts": PhaseConfig(start="20%", trainable=[Role.lora, Role.attn_lora]),
    }
    return config


def problems(config: RunConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    return caught.value.problems


def test_the_default_is_valid():
    validate(valid())


Change = Callable[[RunConfig], object]


def change(path: str, value: object) -> Change:
    """Set one dotted key."""

    def apply(config: RunConfig) -> None:
        *owners, leaf = path.split(".")
        target: object = config
        for owner in owners:
            target = target[owner] if isinstance(target, dict) else getattr(target, owner)
        if isinstance(target, dict):
            target[leaf] = value
        else:
            setattr(target, leaf, value)

    return apply


def both(*changes: Change) -> Change:
    def apply(config: RunConfig) -> None:
        for one in changes:
            one(config)

    return apply


SOFT = both(
    change("moe.router", RouterKind.soft),
    change("moe.load_balance.type", LoadBalanceType.none),
    change("moe.load_balance.aux_loss_coef", None),
)
CSV = change("logger.kind", LoggerKind.csv)

CASES: list[tuple[Change, list[str]]] = [
    # missing parts of moe
    (change("moe.router", None), ["moe.router is required", "top_k or soft"]),
    (change("moe.router_z_loss_coef", None), ["moe.router_z_loss_coef is required", "0.001"]),
    (change("moe.load_balance.type", None), ["moe.load_balance.type is required", "aux_loss or none"]),
    (change("moe.load_balance.aux_loss_coef", None), ["moe.load_balance.aux_loss_coef is required", "0.01"]),
    # the router and its experts
    (change("injection.top_k", 5), ["injection.top_k is 5", "4 experts", "injection.num_experts"]),
    (change("injection.num_experts", 1), ["injection.top_k is 2", "1 experts"]),
    (change("injection.num_experts_by_layer", [4, 1]), ["injection.top_k is 2", "1 experts"]),
    (
        both(change("injection.top_k", 1), change("moe.norm_topk_prob", True)),
        ["moe.norm_topk_prob=true", "injection.top_k=1", "no gradient"],
    ),
    (change("injection.top_k", 0), ["injection.top_k is 0", "at least 1"]),
    (change("injection.num_experts", 0), ["injection.num_experts is 0", "at least 1"]),
    (change("injection.lora_r", 0), ["injection.lora_r is 0", "at least 1"]),
    (change("injection.lora_alpha", 0.0), ["injection.lora_alpha is 0", "above 0"]),
    (change("injection.lora_dropout", 1.0), ["injection.lora_dropout is 1.0", "below 1"]),
    (change("injection.lora_B_std", -0.1), ["injection.lora_B_std is -0.1"]),
    (change("injection.num_experts_by_layer", []), ["injection.num_experts_by_layer is []"]),
    (change("injection.lora_r_by_layer", [4, 0]), ["injection.lora_r_by_layer is [4, 0]"]),
    (change("injection.target_keywords", []), ["injection.target_keywords is empty"]),
    (change("injection.start_layer", -1), ["injection.start_layer is -1"]),
    (change("injection.num_layers", -1), ["injection.num_layers is -1"]),
    (change("injection.attn_lora.keywords", []), ["injection.attn_lora.keywords is empty"]),
    (change("injection.attn_lora.lora_r", 0), ["injection.attn_lora.lora_r is 0"]),
    (change("injection.attn_lora.lora_alpha", -1.0), ["injection.attn_lora.lora_alpha is -1.0"]),
    (change("moe.temperature", 0.0), ["moe.temperature is 0", "above 0"]),
    (change("moe.router_z_loss_coef", -1.0), ["moe.router_z_loss_coef is -1.0", "at least 0"]),
    (change("moe.load_balance.aux_loss_coef", -1.0), ["moe.load_balance.aux_loss_coef is -1.0", "at least 0"]),
    # phases
    (change("phase.phases.experts.start", "150"), ["phase.phases.experts.start=150", "trainer.max_steps=150"]),
    (change("phase.phases.experts.start", "100%"), ["phase.phases.experts.start=100%", "step 150"]),
    (change("phase.phases.experts.start", "soon"), ["phase.phases.experts.start", "'soon'", "20%"]),
    (change("phase.phases.experts.start", "0"), ["router_warmup", "experts", "both start at step 0"]),
    (change("phase.phases.router_warmup.start", "5"), ["router_warmup.start is step 5", "must start at 0"]),
    (change("phase.phases.experts.trainable", []), ["phase.phases.experts.trainable is empty", "trains nothing"]),
    (
        both(change("phase.phases.experts.trainable", [Role.attn_lora]), change("injection.attn_lora.enabled", False)),
        ["phase.phases.experts trains nothing", "injection.attn_lora.enabled=false"],
    ),
    (change("phase.phases.experts.trainable", [Role.backbone]), ["experts.trainable", "backbone", "router, lora"]),
    (change("phase.phases.experts.lr", 0.0), ["phase.phases.experts.lr is 0.0"]),
    (change("phase.phases.experts.warmup_steps", -1), ["phase.phases.experts.warmup_steps is -1"]),
    (change("phase.phases", {}), ["phase.phases is empty", "phase=joint"]),
    # the other sections
    (change("data.max_length", 1), ["data.max_length is 1"]),
    (change("data.batch_size", 0), ["data.batch_size is 0"]),
    (change("data.num_workers", -1), ["data.num_workers is -1"]),
    (change("data.val_rows_per_domain", -1), ["data.val_rows_per_domain is -1"]),
    (both(change("data.path", "x.jsonl"), change("data.val_fraction", 1.0)), ["data.val_fraction is 1.0"]),
    (change("data.chat_template", "/nowhere/chat.jinja"), ["data.chat_template=/nowhere/chat.jinja", "no such file"]),
    (change("optim.lr", 0.0), ["optim.lr is 0.0"]),
    (change("optim.weight_decay", -1.0), ["optim.weight_decay is -1.0"]),
    (change("optim.betas", [0.9]), ["optim.betas is [0.9]"]),
    (change("optim.betas", [0.9, 1.0]), ["optim.betas is [0.9, 1.0]"]),
    (change("optim.warmup_steps", -1), ["optim.warmup_steps is -1"]),
    (change("optim.min_lr_ratio", 2.0), ["optim.min_lr_ratio is 2.0"]),
    (change("optim.roles.routers", RoleOptimConfig(lr=1e-3)), ["optim.roles.routers", "router, lora, attn_lora"]),
    (change("optim.roles.router", RoleOptimConfig(lr=0.0)), ["optim.roles.router.lr is 0.0"]),
    (change("optim.roles.router", RoleOptimConfig(weight_decay=-1.0)), ["optim.roles.router.weight_decay is -1.0"]),
    (change("trainer.max_steps", 0), ["trainer.max_steps is 0"]),
    (change("trainer.accumulate_grad_batches", 0), ["trainer.accumulate_grad_batches is 0"]),
    (change("trainer.val_every_n_steps", -1), ["trainer.val_every_n_steps is -1"]),
    (change("trainer.log_every_n_steps", 0), ["trainer.log_every_n_steps is 0"]),
    (change("trainer.gradient_clip_val", -1.0), ["trainer.gradient_clip_val is -1.0"]),
    (change("trainer.precision", "fp8"), ["trainer.precision is 'fp8'", "bf16-mixed"]),
    (
        both(change("trainer.precision", "16-mixed"), change("trainer.accelerator", Accelerator.cpu)),
        ["trainer.precision=16-mixed", "GPU"],
    ),
    (change("trainer.devices", 2), ["several devices", "trainer=ddp"]),
    (change("checkpoint.every_n_steps", -1), ["checkpoint.every_n_steps is -1"]),
    (change("callbacks.mine", {"_target_": "os.system"}), ["callbacks.mine._target_ is 'os.system'", "allowed"]),
    (change("callbacks.mine", {}), ["callbacks.mine._target_ is None"]),
    (change("seed", -1), ["seed is -1", "from 0"]),
    (change("seed", 2**32), [f"seed is {2**32}"]),
    # changed, and without effect
    (both(SOFT, change("injection.top_k", 3)), ["injection.top_k has no effect", "moe.router=soft"]),
    (both(SOFT, change("moe.norm_topk_prob", False)), ["moe.norm_topk_prob has no effect"]),
    (
        both(change("moe.load_balance.type", LoadBalanceType.none), change("moe.load_balance.aux_loss_coef", 0.5)),
        ["moe.load_balance.aux_loss_coef has no effect"],
    ),
    (
        both(change("injection.num_experts", 8), change("injection.num_experts_by_layer", [2, 4])),
        ["injection.num_experts has no effect", "num_experts_by_layer"],
    ),
    (
        both(change("injection.attn_lora.enabled", False), change("injection.attn_lora.lora_r", 8)),
        ["injection.attn_lora.lora_r has no effect"],
    ),
    (change("data.val_fraction", 0.2), ["data.val_fraction has no effect"]),
    (
        both(change("optim.schedule", LrSchedule.constant), change("optim.min_lr_ratio", 0.1)),
        ["optim.min_lr_ratio has no effect"],
    ),
    (
        both(
            change("phase.phases", {"only": PhaseConfig(trainable=[Role.lora])}),
            change("optim.roles.router", RoleOptimConfig(lr=1e-3)),
        ),
        ["optim.roles.router has no effect", "trains in no phase"],
    ),
    (
        both(change("injection.attn_lora.enabled", False), change("optim.roles.attn_lora", RoleOptimConfig(lr=1e-3))),
        ["optim.roles.attn_lora has no effect"],
    ),
    (change("trainer.compile", True), ["trainer.compile has no effect"]),
    (both(CSV, change("logger.mode", WandbMode.online)), ["logger.mode has no effect", "logger=wandb"]),
    (both(CSV, change("logger.project", "x")), ["logger.project has no effect"]),
    (both(CSV, change("logger.entity", "x")), ["logger.entity has no effect"]),
    (both(CSV, change("logger.group", "x")), ["logger.group has no effect"]),
    (both(CSV, change("logger.tags", ["x"])), ["logger.tags has no effect"]),
]


@pytest.mark.parametrize(("apply", "said"), CASES, ids=[" / ".join(said) for _, said in CASES])
def test_a_bad_value_gives_one_line_that_names_its_key(apply, said):
    config = valid()
    apply(config)
    found = problems(config)
    assert len(found) == 1, found
    for words in said:
        assert words in found[0]


def test_a_default_left_standing_that_does_not_apply_is_no_problem():
    config = valid()
    SOFT(config)
    assert config.injection.top_k == InjectionConfig().top_k
    validate(config)
    config.moe.load_balance.aux_loss_coef = 0.01
    config.data = DataConfig(path="mine.jsonl", val_path="other.jsonl")
    validate(config)


def test_all_problems_are_reported_at_once():
    config = valid()
    config.moe = MoeConfig()
    config.injection.top_k = 9
    config.trainer.max_steps = 0
    config.optim.lr = -1
    found = problems(config)
    keys = [
        "moe.router ",
        "moe.router_z_loss_coef",
        "moe.load_balance.type",
        "trainer.max_steps",
        "optim.lr",
    ]
    for key in keys:
        assert any(line.startswith(key) for line in found), key
    with pytest.raises(ConfigError, match=f"config: {len(found)} problems"):
        validate(config)


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("injection.num_expert", "injection.num_expert: no such key; did you mean num_experts?"),
        ("trainer.max_step", "did you mean max_steps?"),
        ("injektion.lora_r", "did you mean injection?"),
        ("phase.phases.experts.trainabel", "did you mean trainable?"),
        ("optim.roles.router.learning", "allowed: lr, weight_decay"),
        ("injection.attn_lora.enable", "injection.attn_lora.enable: no such key; did you mean enabled?"),
    ],
)
def test_an_unknown_key_is_told_the_near_one(key, suggested):
    assert suggested in (unknown_key(RunConfig, key.split(".")) or "")


@pytest.mark.parametrize(
    "key", ["phase.phases.anything.start", "optim.roles.router.lr", "callbacks.mine.patience", "injection", "seed"]
)
def test_a_known_key_is_no_problem(key):
    assert unknown_key(RunConfig, key.split(".")) is None
