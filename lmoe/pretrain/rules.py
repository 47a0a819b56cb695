"""Problems of a pre-training's config."""

from dataclasses import fields

from lmoe.config.optim import RoleOptimConfig
from lmoe.config.pretrain import PretrainConfig
from lmoe.config.problems import at_least, keys_named, within_sizes, without_effect
from lmoe.config.read import independent
from lmoe.files.places import blocked_folder, exists, expanded, missing_place
from lmoe.files.run_folder import name_problems
from lmoe.rules.validate import (
    checkpoint_problems,
    logger_problems,
    optim_problems,
    seed_problems,
    step_problems,
    trainer_problems,
)
from lmoe.vocabulary import LoggerKind, LrSchedule, NonFinite, Strategy


def pretrain_problems(config: PretrainConfig) -> list[str]:
    """Every problem that shows without reading the text."""
    sizes, config = within_sizes(config)
    corpus, model = config.corpus, config.model
    problems = (
        optim_problems(config.optim)
        + trainer_problems(config.trainer)
        + logger_problems(config.logger)
        + seed_problems(config.seed)
        + name_problems(config.name)
        + checkpoint_problems(config.checkpoint, config.resume)
        + at_least(corpus.batch_size, 1, "corpus.batch_size")
        + at_least(corpus.sequence_length, 1, "corpus.sequence_length")
        + step_problems("corpus.batch_size", corpus.batch_size, config.trainer)
    )
    loop = config.trainer
    if loop.processes > 1 or loop.strategy not in (Strategy.auto, Strategy.deepspeed):
        problems.append(
            f"trainer.strategy={loop.strategy}, devices={loop.devices}, num_nodes={loop.num_nodes}: pretrain works on "
            "one device; leave them out"
        )
    if config.logger.kind is LoggerKind.wandb:
        changed = {"samples": config.logger.samples, "artifact": config.logger.artifact}
        why = "in pretrain, which has neither routers nor an adapter"
        problems += [without_effect(f"logger.{name}", why) for name, given in changed.items() if given]
    for field in fields(model):
        if field.name != "vocab_size":
            problems += at_least(getattr(model, field.name), 1, f"model.{field.name}")
    paths = (("path", corpus.path), ("chats_path", corpus.chats_path), ("chats_exclude", corpus.chats_exclude))
    problems += [
        f"corpus.{name}={value}: no such folder or file"
        for name, value in paths
        if value is not None and not exists(expanded(value))
    ]
    problems += missing_place("eval_sft", config.eval_sft) + blocked_folder("output", config.output)
    if corpus.path is None:
        problems.append("corpus.path is required: a folder of <domain>.txt or <domain>.txt.gz")
    if corpus.chats_exclude is not None and corpus.chats_path is None:
        problems.append("corpus.chats_exclude has no effect without corpus.chats_path; leave it out")
    if not 0 <= corpus.chats_share < 1:
        problems.append(f"corpus.chats_share is {corpus.chats_share}, must be from 0 to below 1")
    if not 0 < corpus.held_out_share < 0.5:
        problems.append(f"corpus.held_out_share is {corpus.held_out_share}, must be above 0 and below 0.5")
    if corpus.sequence_length > model.max_position_embeddings:
        problems.append(
            f"corpus.sequence_length={corpus.sequence_length} is beyond model.max_position_embeddings="
            f"{model.max_position_embeddings}"
        )
    if model.num_key_value_heads >= 1 and model.num_attention_heads % model.num_key_value_heads:
        problems.append(
            f"model.num_attention_heads={model.num_attention_heads} must be a multiple of "
            f"model.num_key_value_heads={model.num_key_value_heads}"
        )
    if model.vocab_size < 300:
        problems.append(f"model.vocab_size is {model.vocab_size}, must be at least 300 (256 bytes and special tokens)")
    if config.optim.schedule is LrSchedule.constant and config.optim.min_lr_ratio:
        problems.append(without_effect("optim.min_lr_ratio", "with optim.schedule=constant"))
    if config.trainer.nonfinite is not NonFinite.stop:
        problems.append(without_effect("trainer.nonfinite", "in pretrain, which always stops"))
    if config.trainer.max_epochs is not None:
        problems.append("trainer.max_epochs has no effect in pretrain; set trainer.max_steps")
    if config.trainer.gradient_checkpointing:
        problems.append("trainer.gradient_checkpointing has no effect in pretrain; leave it out")
    if config.trainer.stop_on_collapse:
        problems.append(without_effect("trainer.stop_on_collapse", "in pretrain, which has no routers"))
    if config.optim.lora_plus_ratio != 1:
        problems.append(without_effect("optim.lora_plus_ratio", "in pretrain, which has no lora_B"))
    if config.checkpoint.save_base:
        problems.append("checkpoint.save_base has no effect in pretrain, which writes the whole base; leave it out")
    if any(settings != RoleOptimConfig() for settings in config.optim.roles.values()):
        problems.append("optim.roles has no effect in pretrain, where every parameter trains alike; leave it out")
    return sizes + independent(problems, keys_named(sizes))
