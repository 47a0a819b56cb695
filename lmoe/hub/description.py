"""What the card of an adapter or a model says, gathered from its folder and from the run that made it.

NOTE of rows it holds the names of files and domains, and losses: nothing that a row says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmoe.adapter.folder import read_adapter_config, sections
from lmoe.adapter.place import adapter_folder
from lmoe.config.data import DataConfig
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig, TaskConfig
from lmoe.errors import CheckpointError, LmoeError
from lmoe.files.hub import is_hub_name
from lmoe.files.resources import BASES
from lmoe.files.run_folder import CONFIG_FILE, SUMMARY_FILE
from lmoe.files.small_file import Reader
from lmoe.hub.contents import Contents
from lmoe.hub.licences import base_licence, bundled_licences, bundled_rows
from lmoe.report.summary import RunSummary
from lmoe.rules.lessons import Lesson, lesson_of
from lmoe.rules.phases import ordered_phases
from lmoe.rules.routers import target_count
from lmoe.rules.strategies import STRATEGIES
from lmoe.run.provenance import provenance_records
from lmoe.vocabulary import Decide, RouterScope, RouterTarget, TaskName

SAVED = Reader(cure="put back the file that the run has written, or push its adapter/ alone from another place")


@dataclass(slots=True, frozen=True, kw_only=True)
class DataSource:
    """Rows that were read.

    Args:
        name: domain of rows that ship with lmoe, name of a data set of the hub, or name of a file.
        licence: None: nobody has stated it here.
        on_hub: whether the name is one of the hub.
        bundled: whether the rows ship with lmoe.
    """

    name: str
    licence: str | None = None
    on_hub: bool = False
    bundled: bool = False


@dataclass(slots=True, frozen=True, kw_only=True)
class ModelDescription:
    """What is known of what is pushed; all of a run is left out where no run is known.

    Args:
        contents: the files, and what kind of thing they are.
        base: what the base is called: on the hub, by lmoe, or the last folder of its path; None: not known.
        base_on_hub: whether others can find it by that name on the hub.
        base_licence: as its card states it.
        settings: by name: strategy, experts, router and so on.
        routes: whether there are routers.
        scores: whether it is a reward model, which scores answers and does not give them.
        expert_names: in their order.
        data: rows that were read for training and validation.
        phases: name, first optimizer step and trained roles.
        objectives: of each phase, by its name, with what is set of it; empty where all learn by sft.
        summary: of the run.
        versions: of packages, by name.
        revision: commit of lmoe's checkout, and whether its files differed from it.
    """

    contents: Contents
    base: str | None = None
    base_on_hub: bool = False
    base_licence: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    routes: bool = False
    scores: bool = False
    expert_names: tuple[str, ...] = ()
    data: tuple[DataSource, ...] = ()
    phases: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    objectives: Mapping[str, str] = field(default_factory=dict)
    summary: RunSummary | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


def describe(contents: Contents) -> ModelDescription:
    """Gather what the card says.

    Raises:
        CheckpointError: a file of the adapter or the run that cannot be read.
    """
    base = contents.base or None
    injection = moe = None
    scores = False
    if (adapter := _adapter_of(contents)) is not None:
        config = read_adapter_config(adapter)
        injection, moe = sections(config, adapter)
        names, trained_on = tuple(config.expert_names), config.base_model["name"]
        scores = config.reward_head
    else:
        names, trained_on = (), contents.base_place
    known, place = base or (Path(trained_on).name if trained_on else None), trained_on or base
    of_run = {} if contents.run is None else _of_run(contents.run)
    return ModelDescription(
        contents=contents,
        base=known,
        base_on_hub=base is not None and base not in BASES,
        base_licence=base_licence(place) if place else None,
        settings={} if injection is None or moe is None else _settings(injection, moe),
        routes=injection is not None and STRATEGIES[injection.strategy].any_routers,
        scores=scores,
        expert_names=names,
        **of_run,
    )


def _adapter_of(contents: Contents) -> Path | None:
    """The adapter that is pushed, or that of the run which an exported folder lies in."""
    if contents.kind.is_lmoe:
        return contents.folder
    try:
        return None if contents.run is None else adapter_folder(contents.run)
    except CheckpointError:
        return None


def _settings(injection: InjectionConfig, moe: MoeConfig) -> dict[str, str]:
    strategy = STRATEGIES[injection.strategy]
    rank = injection.lora_r_by_layer or injection.lora_r
    settings = {"strategy": f"{injection.strategy} ({strategy.description})"}
    if strategy.own_routers:
        settings["experts at each site"] = str(injection.num_experts_by_layer or injection.num_experts)
    settings["rank"] = f"{rank}, lora_alpha {injection.lora_alpha:g}"
    settings["LoRA on attention"] = "yes" if injection.attn_lora.enabled else "no"
    if strategy.own_routers:
        settings["router"] = f"{moe.router} by {moe.router_scope}, top_k {injection.top_k}"
        settings |= _taught(moe) | _by_prompt(moe)
    if strategy.any_routers:
        settings["balance"] = str(moe.load_balance.type)
    return settings


def _taught(moe: MoeConfig) -> dict[str, str]:
    """What the routers were taught; nothing where they learnt from the loss alone."""
    count = target_count(moe)
    if not count:
        return {}
    clusters = moe.router_target is RouterTarget.cluster
    what = f"{count} clusters of prompts" if clusters else f"the domain of a row: {', '.join(moe.domains or [])}"
    return {"routers are taught": what}


def _by_prompt(moe: MoeConfig) -> dict[str, str]:
    """Where experts act and what decides in a conversation, with one router for the whole model; nothing of others."""
    if moe.router_scope is not RouterScope.model:
        return {}
    turn = "each prompt for the answer to it" if moe.decide is Decide.turn else "the first prompt for all that follows"
    return {
        "experts act on": "prompts and answers" if moe.prompt_experts else "answers",
        "in a conversation decides": turn,
    }


def _of_run(run: Path) -> dict[str, Any]:
    config, _ = read_section(RunConfig, SAVED.yaml(run / CONFIG_FILE))
    records, summary = provenance_records(run), _summary(run)
    last = records[-1] if records else {}
    versions, git = last.get("versions"), last.get("git")
    lessons = _lessons(config)
    return {
        "data": data_sources(
            config.data,
            {} if not records else records[-1]["data"],
            [lesson.data for lesson in lessons.values() if lesson.data != config.data],
        ),
        "phases": _phases(config, summary),
        "objectives": objectives(lessons),
        "summary": summary,
        "versions": {k: str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        "revision": _revision(git) if isinstance(git, dict) else None,
    }


def _revision(git: Mapping[str, Any]) -> str | None:
    if not isinstance(git.get("revision"), str):
        return None
    return f"{git['revision'][:12]}{' with changes' if git.get('uncommitted_changes') else ''}"


def _summary(run: Path) -> RunSummary | None:
    file = run / SUMMARY_FILE
    return RunSummary.from_json(file) if file.is_file() else None


def _phases(config: RunConfig, summary: RunSummary | None) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
    """The phases in their order, from the steps at which they began, where the run has recorded them."""
    try:
        planned = ordered_phases(config)
    except (ValueError, LmoeError):
        return ()
    began = {} if summary is None else summary.phases
    return tuple((name, began.get(name, start), tuple(phase.trainable)) for name, start, phase in planned)


def _lessons(config: RunConfig) -> dict[str, Lesson]:
    """What each phase has learnt, as far as the config says it."""
    try:
        return {name: lesson_of(config, name) for name, _, _ in ordered_phases(config)}
    except (ValueError, LmoeError):
        return {}


def objectives(lessons: Mapping[str, Lesson]) -> dict[str, str]:
    """The objective of each phase with its settings; nothing where all learn by sft."""
    if all(lesson.task.name is TaskName.sft for lesson in lessons.values()):
        return {}
    return {phase: " ".join([str(lesson.task.name), *_settings_of(lesson.task)]) for phase, lesson in lessons.items()}


def _settings_of(task: TaskConfig) -> list[str]:
    """Settings of an objective that say what it learns."""
    named = {"beta": task.beta, "gamma": task.gamma, "loss_type": task.loss_type, "reference": task.reference}
    return [f"{name}={value}" for name, value in named.items() if value is not None]


def data_sources(
    config: DataConfig, read: Mapping[str, str], of_phases: Sequence[DataConfig] = ()
) -> tuple[DataSource, ...]:
    """The rows of a run, each once.

    Args:
        config: section data of the run.
        read: SHA-256 of each file that was read, by its path, or something else by the name of a data set.
        of_phases: the same section of phases that have rows of their own.
    """
    every = [config, *of_phases]
    named = {place for one in every for place in (one.path, one.val_path, one.judge_path)}
    named |= {source.path for one in every for source in one.sources.values()}
    bundled, licences = bundled_rows(), bundled_licences()
    found = []
    for place, digest in read.items():
        if (rows := bundled.get(digest)) is not None:
            if _left_out(rows.domain, every):
                continue
            found.append(DataSource(name=rows.name, licence=licences.get(rows), bundled=True))
        elif place in named and is_hub_name(place):
            found.append(DataSource(name=place, on_hub=True))
        else:
            found.append(DataSource(name=Path(place).name))
    return tuple(dict.fromkeys(found))


def _left_out(domain: str, configs: Sequence[DataConfig]) -> bool:
    """Whether a domain of the rows that ship with lmoe is one that no section takes: those that read them, or all."""
    sections = [config for config in configs if config.is_bundled] or configs
    return all(config.domains is not None and domain not in config.domains for config in sections)
