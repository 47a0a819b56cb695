"""Every bad value gives one line that names its key, says what was got and what to do; all lines come at once."""

from collections.abc import Callable

import pytest

from lmoe.config.data import DataConfig
from lmoe.config.defaults import moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.keys import unknown_key
from lmoe.config.moe import LoadBalanceConfig, MoeConfig
from lmoe.config.optim import RoleOptimConfig
from lmoe.config.phase import PhaseConfig
from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError
from lmoe.rules.validate import run_problems, section_problems, validate
from lmoe.vocabulary import (
    Accelerator,
    BackbonePrecision,
    Backend,
    BalanceScope,
    InitLora,
    LoadBalanceType,
    LoggerKind,
    LrSchedule,
    Mixing,
    MixtureScale,
    Role,
    RouterDtype,
    RouterKind,
    RouterScope,
    Strategy,
    WandbMode,
)


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


def router(kind: RouterKind, balance: LoadBalanceType = LoadBalanceType.none) -> Change:
    """Another router with the balance that goes with it."""
    rate = 0.001 if balance is LoadBalanceType.aux_loss_free else None
    coefficient = 0.01 if balance in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv) else None
    return both(
        change("moe.router", kind),
        change("moe.router_z_loss_coef", 0.0),
        change("moe.load_balance.type", balance),
        change("moe.load_balance.aux_loss_coef", coefficient),
        change("moe.load_balance.bias_update_rate", rate),
    )


RELU, SIGMOID = router(RouterKind.relu), router(RouterKind.sigmoid, LoadBalanceType.aux_loss_free)
TOP_P = both(router(RouterKind.top_p, LoadBalanceType.aux_loss), change("moe.top_p", 0.4))
JOINT = change("phase.phases", {"joint": PhaseConfig(trainable=[Role.router, Role.lora, Role.attn_lora])})
OWN_Z_LOSS = change("phase.phases", {"joint": PhaseConfig(trainable=[Role.router, Role.lora], router_z_loss_coef=0.5)})
UNIFORM, RANDOM = both(router(RouterKind.uniform), JOINT), both(router(RouterKind.random), JOINT)
ORACLE = both(router(RouterKind.oracle), JOINT)

TWO_GPUS = both(change("trainer.strategy", Strategy.ddp), change("trainer.devices", 2))

LAYERS_APART = both(change("trainer.strategy", Strategy.device_map), change("trainer.devices", 2))

CASES: list[tuple[Change, list[str]]] = [
    # devices
    (both(LAYERS_APART, change("trainer.num_nodes", 2)), ["device_map is one process", "trainer.num_nodes=2", "fsdp2"]),
    (both(LAYERS_APART, change("trainer.accelerator", Accelerator.cpu)), ["layers onto GPUs", "trainer.devices=2 out"]),
    (
        both(LAYERS_APART, change("trainer.compile", True)),
        ["trainer.compile=true", "trainer.strategy=device_map"],
    ),
    (change("trainer.device_ids", [0, 1]), ["trainer.device_ids is [0, 1]", "trainer.devices=1"]),
    (
        both(TWO_GPUS, change("trainer.device_ids", [1, 1])),
        ["trainer.device_ids is [1, 1]", "different GPUs", "trainer.devices=2"],
    ),
    (change("trainer.device_ids", [-1]), ["trainer.device_ids is [-1]", "counted from 0"]),
    (
        both(change("trainer.accelerator", Accelerator.cpu), change("trainer.device_ids", [0])),
        ["trainer.device_ids has no effect", "trainer.accelerator=cpu"],
    ),
    # missing parts of moe
    (change("moe.router", None), ["moe.router is required", "top_k or soft"]),
    (change("moe.router_z_loss_coef", None), ["moe.router_z_loss_coef is required", "0.001"]),
    (change("moe.load_balance.type", None), ["moe.load_balance.type is required", " or ".join(LoadBalanceType)]),
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
    (change("injection.shared_lora_r", 0), ["injection.shared_lora_r is 0", "at least 1"]),
    (change("moe.temperature_end", 0.0), ["moe.temperature_end is 0", "above 0"]),
    (change("moe.router_noise", -1.0), ["moe.router_noise is -1.0", "at least 0"]),
    (change("moe.router_noise_end", -1.0), ["moe.router_noise_end is -1.0", "at least 0"]),
    (
        both(change("moe.router_noise", 1.0), change("moe.router_noise_end", 0.0), change("moe.anneal_steps", "soon")),
        ["moe.anneal_steps", "'soon'", "20%"],
    ),
    (change("moe.expert_dropout", 1.0), ["moe.expert_dropout is 1.0", "below 1"]),
    (change("moe.diversity_coef", -1.0), ["moe.diversity_coef is -1.0", "at least 0"]),
    (both(TOP_P, change("moe.top_p", None)), ["moe.top_p is required", "0.4"]),
    (both(TOP_P, change("moe.top_p", 1.5)), ["moe.top_p is 1.5", "at most 1"]),
    (both(RELU, change("moe.l1_start", 0.0)), ["moe.l1_start is 0", "1e-12 to 10000"]),
    (both(RELU, change("moe.l1_growth", 1.0)), ["moe.l1_growth is 1.0", "above 1"]),
    (both(ORACLE, change("moe.domains", ["a", "a"])), ["moe.domains is ['a', 'a']", "different names"]),
    (
        both(SIGMOID, change("moe.load_balance.bias_update_rate", None)),
        ["moe.load_balance.bias_update_rate is required", "0.001"],
    ),
    (
        both(SIGMOID, change("moe.load_balance.bias_update_rate", 0.0)),
        ["moe.load_balance.bias_update_rate is 0", "above 0"],
    ),
    (
        both(
            change("moe.load_balance.type", LoadBalanceType.importance_cv),
            change("moe.load_balance.aux_loss_coef", None),
        ),
        ["moe.load_balance.aux_loss_coef is required", "importance_cv"],
    ),
    # what does not go together
    (
        both(change("injection.top_k", 1), change("moe.scale", MixtureScale.sum_to_one)),
        ["moe.scale=sum_to_one", "injection.top_k=1", "no gradient", "raw or unit"],
    ),
    (
        both(change("moe.scale", MixtureScale.unit), change("moe.norm_topk_prob", False)),
        ["moe.norm_topk_prob and moe.scale", "leave one of them out"],
    ),
    (
        both(change("injection.init_lora", InitLora.svd), change("injection.shared_lora_A", True)),
        ["injection.init_lora=svd", "injection.shared_lora_A=true"],
    ),
    (
        both(
            RELU,
            change("moe.load_balance", LoadBalanceConfig(type=LoadBalanceType.aux_loss_free, bias_update_rate=0.1)),
        ),
        ["moe.load_balance.type=aux_loss_free cannot act on moe.router=relu", "aux_loss, importance_cv, none"],
    ),
    (
        both(RANDOM, change("moe.load_balance", LoadBalanceConfig(type=LoadBalanceType.aux_loss, aux_loss_coef=0.01))),
        ["moe.load_balance.type=aux_loss cannot act on moe.router=random", "allowed: none"],
    ),
    (
        both(
            SIGMOID,
            change("injection.num_experts", 1),
            change("injection.top_k", 1),
        ),
        ["aux_loss_free has nothing to balance with one expert"],
    ),
    (both(TOP_P, change("moe.backend", Backend.grouped)), ["moe.backend=grouped", "fixed number", "moe.router=top_p"]),
    (
        both(change("moe.backend", Backend.grouped), change("moe.mixing", Mixing.factors)),
        ["moe.backend=grouped cannot compute moe.mixing=factors"],
    ),
    (both(TOP_P, change("moe.backend", Backend.triton)), ["moe.backend=triton", "fixed number", "moe.router=top_p"]),
    (
        both(change("moe.backend", Backend.triton), change("moe.mixing", Mixing.factors)),
        ["moe.backend=triton cannot compute moe.mixing=factors"],
    ),
    (
        both(change("moe.backend", Backend.triton), change("injection.shared_lora_A", True)),
        ["moe.backend=triton cannot compute injection.shared_lora_A=true", "use stacked or auto"],
    ),
    (
        both(change("moe.backend", Backend.triton), change("trainer.accelerator", Accelerator.cpu)),
        ["moe.backend=triton computes on a GPU, and trainer.accelerator=cpu", "moe.backend=auto"],
    ),
    # phases
    (router(RouterKind.random), ["phase.phases.router_warmup trains nothing", "moe.router=random", "phase=joint"]),
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
    (both(change("data.path", "some/rows"), change("data.val_fraction", 1.0)), ["data.val_fraction is 1.0"]),
    (change("data.chat_template", "/nowhere/chat.jinja"), ["data.chat_template=/nowhere/chat.jinja", "no such file"]),
    (change("optim.lr", 0.0), ["optim.lr is 0.0"]),
    (change("optim.weight_decay", -1.0), ["optim.weight_decay is -1.0"]),
    (change("optim.betas", [0.9]), ["optim.betas is [0.9]"]),
    (change("optim.betas", [0.9, 1.0]), ["optim.betas is [0.9, 1.0]"]),
    (change("optim.warmup_steps", -1), ["optim.warmup_steps is -1"]),
    (change("optim.min_lr_ratio", 2.0), ["optim.min_lr_ratio is 2.0"]),
    (change("optim.lora_plus_ratio", 0.5), ["optim.lora_plus_ratio is 0.5", "at least 1"]),
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
    (both(SOFT, change("moe.scale", MixtureScale.raw)), ["moe.scale=raw has no effect", "sum_to_one, unit"]),
    (
        both(ORACLE, change("moe.scale", MixtureScale.unit)),
        ["moe.scale=unit has no effect", "none, its one weight is 1"],
    ),
    (both(TOP_P, change("injection.top_k", 3)), ["injection.top_k has no effect", "chooses by moe.top_p"]),
    (both(ORACLE, change("injection.top_k", 1)), ["injection.top_k has no effect", "chooses one expert"]),
    (both(RELU, change("moe.temperature", 2.0)), ["moe.temperature has no effect", "moe.router=relu"]),
    (both(RELU, change("moe.temperature_end", 2.0)), ["moe.temperature_end has no effect", "moe.router=relu"]),
    (both(UNIFORM, change("moe.router_noise", 1.0)), ["moe.router_noise has no effect", "moe.router=uniform"]),
    (both(UNIFORM, change("moe.router_noise_end", 1.0)), ["moe.router_noise_end has no effect", "moe.router=uniform"]),
    (
        both(change("injection.top_k", 4), change("moe.expert_dropout", 0.1)),
        ["moe.expert_dropout has no effect", "injection.top_k=4 and at most 4 experts a site, all of which stay"],
    ),
    (
        both(SOFT, change("injection.num_experts", 1), change("moe.expert_dropout", 0.1)),
        ["moe.expert_dropout has no effect", "moe.router=soft and at most 1 experts a site"],
    ),
    (both(UNIFORM, change("moe.expert_dropout", 0.1)), ["moe.expert_dropout has no effect", "moe.router=uniform"]),
    (
        both(UNIFORM, change("moe.router_dtype", RouterDtype.bfloat16)),
        ["moe.router_dtype has no effect", "moe.router=uniform"],
    ),
    (
        both(UNIFORM, change("moe.router_scope", RouterScope.block)),
        ["moe.router_scope has no effect", "moe.router=uniform"],
    ),
    (both(RANDOM, change("moe.router_z_loss_coef", 0.5)), ["moe.router_z_loss_coef has no effect", "random"]),
    (change("moe.top_p", 0.4), ["moe.top_p has no effect", "moe.router=top_k"]),
    (change("moe.l1_start", 0.1), ["moe.l1_start has no effect", "moe.router=top_k"]),
    (change("moe.l1_growth", 1.5), ["moe.l1_growth has no effect", "moe.router=top_k"]),
    (change("moe.domains", ["a", "b"]), ["moe.domains has no effect", "moe.router=top_k"]),
    (both(ORACLE, change("moe.mixing", Mixing.factors)), ["moe.mixing has no effect", "moe.router=oracle"]),
    (change("moe.anneal_steps", "50%"), ["moe.anneal_steps has no effect", "moe.temperature_end"]),
    (
        change("moe.load_balance.bias_update_rate", 0.1),
        ["moe.load_balance.bias_update_rate has no effect", "type=aux_loss_free"],
    ),
    (
        both(SOFT, change("moe.load_balance.scope", BalanceScope.global_batch)),
        ["moe.load_balance.scope has no effect", "type=none"],
    ),
    (
        both(change("injection.init_lora", InitLora.svd), change("injection.lora_B_std", 0.1)),
        ["injection.lora_B_std has no effect", "init_lora=svd"],
    ),
    (
        both(
            change("injection.lora_r", 8),
            change("injection.lora_r_by_layer", [2, 4]),
            change("injection.attn_lora.lora_r", 4),
        ),
        ["injection.lora_r has no effect", "lora_r_by_layer"],
    ),
    (
        both(change("injection.attn_lora.enabled", False), change("injection.attn_lora.use_dora", True)),
        ["injection.attn_lora.use_dora has no effect"],
    ),
    (
        both(SOFT, change("phase.phases.experts.load_balance", True)),
        ["phase.phases.experts.load_balance=true has no effect", "type=none"],
    ),
    (
        both(change("moe.router_z_loss_coef", 0.0), change("phase.phases.experts.router_z_loss", True)),
        ["phase.phases.experts.router_z_loss=true has no effect"],
    ),
    (
        both(UNIFORM, OWN_Z_LOSS),
        ["phase.phases.joint.router_z_loss_coef has no effect", "moe.router=uniform"],
    ),
    (
        both(RANDOM, OWN_Z_LOSS),
        ["phase.phases.joint.router_z_loss_coef has no effect", "moe.router=random"],
    ),
    (change("phase.phases.experts.router_noise", True), ["experts.router_noise=true has no effect"]),
    (change("phase.phases.experts.expert_dropout", True), ["experts.expert_dropout=true has no effect"]),
    (change("phase.phases.experts.diversity", True), ["experts.diversity=true has no effect"]),
    (
        both(
            change("phase.phases", {"only": PhaseConfig(trainable=[Role.router])}), change("optim.lora_plus_ratio", 4.0)
        ),
        ["optim.lora_plus_ratio has no effect"],
    ),
    (both(RANDOM, change("trainer.stop_on_collapse", True)), ["trainer.stop_on_collapse has no effect", "random"]),
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
    (
        both(change("trainer.compile", True), change("backbone.precision", BackbonePrecision.nf4)),
        ["trainer.compile=true is not for backbone.precision=nf4", "set trainer.compile=false"],
    ),
    (change("logger.project", "a/b:c"), ["logger.project=a/b:c: W&B takes no / :"]),
    (change("logger.project", "p" * 129), ["logger.project has 129 characters; W&B takes at most 128"]),
    (change("logger.project", " "), ["logger.project is empty; name one"]),
    (change("logger.group", ""), ["logger.group is empty", "null"]),
    (change("logger.entity", ""), ["logger.entity is empty", "null"]),
    (change("logger.tags", ["a", ""]), ["logger.tags[1] has 0 characters; W&B takes 1 to 64"]),
    (change("logger.tags", ["t" * 65]), ["logger.tags[0] has 65 characters"]),
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
    config.data = DataConfig(path="mine/rows", val_path="other/rows")
    validate(config)


@pytest.mark.parametrize("kind", RouterKind)
def test_every_router_is_valid_with_the_balance_that_goes_with_it(kind):
    """So that each line above comes from the one change that it names."""
    config = valid()
    both(JOINT, change("moe", moe_section({"router": kind.value})))(config)
    validate(config)


def test_expert_dropout_without_effect_ends_no_run_that_goes_on_and_no_adapter(tmp_path):
    """Earlier versions took it, and taking an expert out of an adapter may leave as many as top_k."""
    config = valid()
    both(change("injection.top_k", 4), change("moe.expert_dropout", 0.1))(config)
    assert section_problems(config.injection, config.moe) == []
    config.resume = str(tmp_path)
    assert run_problems(config) == []


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


@pytest.mark.parametrize("precision", [BackbonePrecision.nf4, BackbonePrecision.int8])
@pytest.mark.parametrize("accelerator", Accelerator)
def test_a_quantised_base_trains_on_one_device_and_on_several(precision, accelerator):
    config = valid()
    config.backbone.precision, config.trainer.accelerator = precision, accelerator
    validate(config)
    config.trainer.strategy, config.trainer.devices = Strategy.ddp, 2
    validate(config)
