"""The parts of a run from its config: backbone with experts, rows, module, data."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.inject import inject
from lmoe.adapter.save import stored_name
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.backbones.head import shares_embeddings
from lmoe.backbones.load import load_tokenizer
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.problems import raise_problems
from lmoe.config.run import RunConfig
from lmoe.data.chats.template_source import take_template
from lmoe.data.datamodule import TrainingData
from lmoe.data.prepare import PreparedData
from lmoe.data.stream import RowStream
from lmoe.errors import ConfigError
from lmoe.grow.import_experts import import_experts
from lmoe.injection.apply import plan as make_plan
from lmoe.injection.compiled import compile_layers
from lmoe.injection.plan import InjectionPlan
from lmoe.injection.record import injected
from lmoe.injection.roles import parameter_layers, parameter_roles
from lmoe.objectives.objective import Objective
from lmoe.ops.linear_sizes import parameter_counts
from lmoe.rules.data import data_warnings
from lmoe.rules.experts_from import named_adapters, without_source
from lmoe.rules.phases import has_reward_head, lora_B_std, phase_warnings, trained_base
from lmoe.rules.routers import needs_domain, target_count
from lmoe.rules.validate import has_length, run_problems
from lmoe.run.base import load_base
from lmoe.run.clustered_rows import ClusteredRows, clustered_rows, fitted_by_the_run, in_one_cluster
from lmoe.run.devices import seed_apart
from lmoe.run.learnt import Learnt, check_context, check_monitors, read_lessons, row_sets
from lmoe.run.targets import target_lines, taught_before, with_targets
from lmoe.run.template_day import with_template_day
from lmoe.training.dials import Dials
from lmoe.training.module import AdapterModule
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import BackbonePrecision, Role, RouterTarget


@dataclass(slots=True, kw_only=True)
class Parts:
    """Everything that a run or a preflight needs.

    Args:
        plan: what was injected.
        learnt: in each phase, in their order.
        prepared: rows of the first phase.
        warnings: what is allowed and perhaps not meant.
        base_model: name, revision, precision and fingerprint, as the adapter file records them.
        loading: how the base was read, where there was a choice.
        target_lines: what the routers are taught; of clusters also what is in them.
        clustered: the rows in clusters, where these are what the routers are taught.
    """

    config: RunConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: InjectionPlan
    learnt: list[Learnt]
    prepared: PreparedData
    datamodule: TrainingData
    module: AdapterModule
    warnings: list[str]
    base_model: dict[str, Any]
    loading: list[str] = field(default_factory=list)
    target_lines: list[str] = field(default_factory=list)
    clustered: ClusteredRows | None = None

    def row_sets(self) -> list[Learnt]:
        """The first phase that learns from each set of rows, in the order of the sets."""
        return row_sets(self.learnt)

    def data_hashes(self) -> dict[str, str]:
        """SHA-256 by path, of all files of rows."""
        return {path: digest for rows in self.row_sets() for path, digest in rows.prepared.report.data_hashes.items()}


def build_parts(
    config: RunConfig,
    *,
    run_dir: Path | None = None,
    fill_experts: bool = True,
    fit_clusters: bool = True,
    objective: Objective | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Parts:
    """Build what a validated config describes.

    Args:
        config: validated; that of the parts has the day that its chat template reads.
        run_dir: the run's folder; None: nothing of the run is written.
        fill_experts: read what injection.experts_from names; a run that goes on has it in its checkpoint.
        fit_clusters: put rows into clusters where routers are taught these, which takes a forward of all prompts.
        objective: of all phases, in place of those that the config names.
        say: told what takes a while, before it is done.

    Raises:
        LmoeError: a backbone, rows or a plan that cannot be had.
    """
    seed_everything(config.seed, verbose=False)
    backbone = config.backbone
    tokenizer = load_tokenizer(backbone)
    # From here on the template is the tokenizer's, which the adapter keeps.
    take_template(tokenizer, config.data.chat_template, config.data.template_kwargs)
    config = with_template_day(config, tokenizer, run_dir)
    model, loading = load_base(config)
    learnt = read_lessons(config, tokenizer, model, objective)
    prepared = learnt[0].prepared
    config = with_length(config, prepared, from_checkpoint=not fill_experts)
    check_monitors(config, learnt)
    check_context(learnt, model)
    check_base_training(config, model)
    base_model = stored_name(backbone) | {
        "revision": backbone.revision,
        "precision": backbone.precision.value,
        "trust_remote_code": backbone.trust_remote_code,
    }
    before = taught_before(config) if fill_experts else None
    moe = with_targets(with_domains(config.moe, config.injection, prepared.domains), config, prepared, before)
    lines, clustered = target_lines(moe, config, prepared), None
    if before is not None:  # which may be gone when the run goes on
        names = moe.domains if moe.router_target is RouterTarget.domain else None  # clusters are counted anew
        config = replace(config, moe=replace(moe, domains=names))
    if moe.router_target is RouterTarget.cluster:
        make_plan(model, config.injection, moe)  # a model that no experts can be put into need not read prompts
        if not fit_clusters or fitted_by_the_run(config, prepared):
            clustered = in_one_cluster(prepared)
        else:
            clustered = clustered_rows(config, prepared, model, tokenizer, target_count(moe), run_dir, say)
        prepared, lines = clustered.prepared, lines + clustered.lines
        learnt = [replace(phase, prepared=prepared) for phase in learnt]  # phases with rows of their own have none
    seed_everything(config.seed, verbose=False)  # so that adapters do not depend on what was done before
    seed_apart(config.trainer, config.seed)
    settings = replace(without_source(config.injection), lora_B_std=lora_B_std(config))
    plan = inject(model, settings, moe, trained_base=trained_base(config), reward_head=has_reward_head(config))
    if fill_experts and config.injection.experts_from is not None:
        import_experts(model, config.injection.experts_from)
    base_model["fingerprint"] = injected(model).fingerprint
    check_roles(config, model)
    compiler = None
    if config.trainer.compile:
        compiler = compile_layers(model, recompute=config.trainer.gradient_checkpointing)
    elif config.trainer.gradient_checkpointing:
        recompute_activations(model)
    first, *others = (phase.samples() for phase in row_sets(learnt))
    datamodule = TrainingData(
        prepared,
        first.config,
        units=first.units,
        collate=first.collate,
        others=others,
        seed=config.seed,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        pad_token_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
    )
    module = AdapterModule(
        model,
        [phase.objective for phase in learnt],
        PhaseSchedule.of(config),
        config.optim,
        prepared.domains,
        datamodule.window_totals,
        Dials.of(config),
        compiler,
    )
    numbers = [phase.number for phase in learnt]
    datamodule.follow(lambda step: numbers[module.schedule.phase_at(step)], lambda: numbers[module.phase])
    return Parts(
        config=config,
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        learnt=learnt,
        prepared=prepared,
        datamodule=datamodule,
        module=module,
        warnings=phase_warnings(config) + data_warnings(config.data, config.moe),  # the plan's are printed with it
        base_model=base_model,
        loading=loading,
        target_lines=lines,
        clustered=clustered,
    )


def with_length(config: RunConfig, prepared: PreparedData, *, from_checkpoint: bool) -> RunConfig:
    """The config, with trainer.max_steps worked out from trainer.max_epochs where that is not done yet.

    Args:
        from_checkpoint: whether the run goes on from a checkpoint, and so has its length recorded.

    Raises:
        ConfigError: phases or schedules that do not fit into a run of that length.
    """
    trainer = config.trainer
    if from_checkpoint or has_length(config) or isinstance(prepared.train, RowStream):
        return config
    samples = config.data.batch_size * trainer.accumulate_grad_batches * trainer.processes
    assert trainer.max_epochs is not None, "a run has max_epochs or max_steps"
    steps = max(1, math.ceil(trainer.max_epochs * len(prepared.train) / samples))
    long = replace(config, trainer=replace(trainer, max_steps=steps))
    raise_problems(
        [
            f"{problem} (trainer.max_epochs={trainer.max_epochs:g} of {len(prepared.train):,} samples)"
            for problem in run_problems(replace(long, trainer=replace(long.trainer, max_epochs=None)))
        ]
    )
    return long


def with_domains(moe: MoeConfig, injection: InjectionConfig, domains: list[str]) -> MoeConfig:
    """The section, with the oracle's experts named by the domains of the data where it does not name them, in the order
    of injection.experts_from where adapters are named like domains.

    Raises:
        ConfigError: an oracle without domains, with too few experts, or with other domains than the data.
    """
    if not needs_domain(moe):
        return moe
    if len(domains) < 2:
        raise ConfigError(
            "moe.router=oracle chooses the expert by the row's domain, and all rows are of one domain; give the rows a "
            'field "domain", or use another router'
        )
    fewest = injection.fewest_experts
    imported = list(named_adapters(injection))
    default = imported if set(domains) <= set(imported) else list(domains)
    names = default if moe.domains is None else moe.domains
    if fewest < len(names):
        raise ConfigError(
            f"moe.router=oracle needs an expert for each of the {len(names)} domains ({', '.join(names)}), and a site "
            f"has {fewest}; set injection.num_experts={len(names)}"
        )
    if missing := [name for name in domains if name not in names]:
        raise ConfigError(f"moe.domains names no expert for {', '.join(missing)} of the data; it has {names}")
    return replace(moe, domains=names)


def check_base_training(config: RunConfig, model: PreTrainedModel) -> None:
    """Refuse to train a backbone in which small steps would be lost.

    Raises:
        ConfigError: a phase trains parts of a backbone that is stored in less than float32, where small steps round to
            nothing; says what float32 would take.
    """
    roles, precision = trained_base(config), config.backbone.precision
    if not roles or precision is BackbonePrecision.float32:
        return
    text = model.config.get_text_config()
    trained = text.vocab_size * text.hidden_size if Role.head in roles else 0
    if Role.base_ffn in roles:
        trained += base_ffn_parameters(model, make_plan(model, config.injection, config.moe))
    raise ConfigError(
        f"a phase trains {', '.join(sorted(roles))}, and backbone.precision={precision} would round its steps away. "
        f"{trained:,} parameters would take {4 * trained / 1e9:.2f} GB in float32, and {12 * trained / 1e9:.2f} GB for "
        "their gradients and AdamW's moments: set backbone.precision=float32, or take these roles out of the phases"
    )


def base_ffn_parameters(model: PreTrainedModel, plan: InjectionPlan) -> int:
    """Parameters with the role base_ffn once the plan is applied: copies count in place of what they copy."""
    copied = {site.path: site.num_experts * site.copied_parameters for site in plan.sites if site.copied_parameters}
    blocks = [path for path in plan.base_ffn if path not in copied]
    routers = tuple(f"{path}." for path in plan.native_routers)
    return sum(copied.values()) + sum(
        count
        for path in blocks
        for name, count in parameter_counts(model.get_submodule(path)).items()
        if not f"{path}.{name}".startswith(routers)
    )


def check_roles(config: RunConfig, model: PreTrainedModel) -> None:
    """Refuse to train parts of the backbone that it does not have, and to fade experts that it does not have.

    Raises:
        ConfigError: a phase trains a part of the backbone that has no parameters of its own, or layers without any, or
            fades an expert that no site has.
    """
    there = set(parameter_roles(model).values())
    if missing := sorted(trained_base(config) - there):
        shared = missing[0] is Role.head and shares_embeddings(model)
        why = ": it shares its weights with the input embeddings" if shared else ""
        raise ConfigError(f"a phase trains {missing[0]}, of which this backbone has no parameters{why}; leave it out")
    roles, layers = parameter_roles(model), parameter_layers(model)
    plan, problems = injected(model).plan, []
    count, experts = len(plan.layers), max(plan.routers.values(), default=0)
    for phase in PhaseSchedule.of(config).phases:
        key = f"phase.phases.{phase.name}.target_layers"
        if wrong := [layer for layer in phase.layers or () if not -count <= layer < count]:
            problems.append(
                f"{key} names layer {wrong[0]}; the backbone has {count}: 0 to {count - 1}, or -{count} to -1"
            )
        elif phase.layers is not None and not any(
            roles[name] in phase.trainable and layers[name] is not None and phase.trains_layer(layers[name], count)
            for name in roles
        ):
            problems.append(f"{key}={list(phase.layers)}: nothing of {', '.join(sorted(phase.trainable))} is there")
        faded = () if phase.handoff is None else phase.handoff.experts or ()
        if wrong := [expert for expert in faded if not 0 <= expert < experts]:
            problems.append(
                f"phase.phases.{phase.name}.lora_handoff.experts names expert {wrong[0]}; the sites of this backbone "
                f"have {experts}: 0 to {experts - 1}"
            )
    if problems:
        raise ConfigError(problems)


def data_notes(prepared: PreparedData) -> list[str]:
    """Rows that were dropped or cut, one line a source and reason, and what else is to be known of them."""
    notes = []
    for source in prepared.report.sources:
        account = source.account
        if account.formats:
            notes.append(f"data: {source.path}: {source.formats}")
        notes += [
            f"data: {count} of {account.read} rows of {source.path} dropped: {why}"
            for why, count in sorted(account.dropped.items())
        ]
        if account.truncated:
            notes.append(f"data: {account.truncated} of {account.read} rows of {source.path} cut at data.max_length")
    return notes + [f"data: {note}" for note in prepared.report.notes()]
