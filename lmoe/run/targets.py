"""What the routers of a run are taught, once its rows are known: domains, or clusters of prompts."""

from dataclasses import replace

from lmoe.adapter.folder import read_adapter_config, sections
from lmoe.adapter.place import adapter_folder
from lmoe.config.moe import MoeConfig
from lmoe.config.run import RunConfig
from lmoe.data.domains import names_of
from lmoe.data.prepare import PreparedData
from lmoe.data.stream import RowStream
from lmoe.errors import ConfigError
from lmoe.rules.experts_from import KEY, named_adapters, source_run
from lmoe.rules.lessons import lesson_of, taught
from lmoe.rules.phase_options import always_by_target, idle_balance
from lmoe.rules.phases import trained_base
from lmoe.rules.routers import ROUTERS, WITHOUT_TARGETS, cluster_names, mixture_scale, needs_prompt, target_count
from lmoe.run.clusters import check_prompts
from lmoe.vocabulary import LoadBalanceType, Role, RouteBy, RouterTarget

LOOKED_AT = 4096
"""Rows of a stream, about, to see which domains they are of."""


def with_targets(
    moe: MoeConfig, config: RunConfig, prepared: PreparedData, before: MoeConfig | None = None
) -> MoeConfig:
    """The section with router_target decided, and the names of the targets in `domains`.

    Experts that exist keep what they are for: adapters are the targets of their names, and a run that is taken over
    keeps its domains, behind which come those that are new.

    Args:
        moe: of the config.
        config: of the run.
        prepared: its rows.
        before: the section of the run that injection.experts_from names; None: it names none, or this run goes on and
            has recorded its targets.

    Raises:
        ConfigError: no targets can be made of these rows, or more than a site has experts.
    """
    if moe.router_target is RouterTarget.none:
        return moe
    fewest = config.injection.fewest_experts
    domains, known = trained_domains(prepared), known_targets(config, before)
    target = moe.router_target
    if target is RouterTarget.auto and before is not None:
        if before.router_target is not RouterTarget.domain or len(_with_new(known, domains)) > fewest:
            return _without_targets(moe, config)  # their experts are for other rows
        target = RouterTarget.domain
    elif target is RouterTarget.auto:
        target = RouterTarget.domain if known or 2 <= len(domains) <= fewest else RouterTarget.cluster
    if target is RouterTarget.domain:
        names = _domain_names(moe, domains, known, fewest)
        if _all_rows_known(config, prepared):
            _check_named(names, _with_new(known, domains))
    else:
        names = cluster_names(fewest if config.data.clusters is None else config.data.clusters)
    if target is RouterTarget.domain and config.data.clusters is not None:
        raise ConfigError(
            f"data.clusters={config.data.clusters} has no effect: the rows name {len(domains)} domains, which "
            "moe.router_target=auto takes; use router_target=cluster, or leave it out"
        )
    if target is RouterTarget.cluster:
        _check_clusters(len(names), moe, config, prepared)
    return replace(moe, router_target=target, domains=names)


def taught_before(config: RunConfig) -> MoeConfig | None:
    """The section of the run that injection.experts_from names, where its targets decide those of this run; else None.

    Raises:
        CheckpointError, HubError: it cannot be read.
    """
    run = source_run(config.injection)
    if run is None or config.moe.router_target is RouterTarget.none:
        return None
    folder = adapter_folder(run)
    return sections(read_adapter_config(folder), folder)[1]


def known_targets(config: RunConfig, before: MoeConfig | None) -> list[str]:
    """What the experts that exist are for, in their order; empty where all are new, or were for clusters of other rows.

    Args:
        config, before: as of `with_targets`.
    """
    if before is not None:
        return list(before.domains or []) if before.router_target is RouterTarget.domain else []
    moe, goes_on = config.moe, config.resume is not None and source_run(config.injection) is not None
    if goes_on and moe.router_target is RouterTarget.domain:
        return list(moe.domains or [])  # as they were recorded, with those of the run that was taken over
    return list(named_adapters(config.injection))


def _without_targets(moe: MoeConfig, config: RunConfig) -> MoeConfig:
    """The section of routers that learn from the loss alone.

    Raises:
        ConfigError: a phase trains experts on targets, or clusters are asked for.
    """
    if config.data.clusters is not None:
        raise ConfigError(
            f"data.clusters={config.data.clusters} has no effect: the experts of {KEY}={config.injection.experts_from} "
            "are for other rows than these, so that routers learn from the loss; leave it out"
        )
    by_target = [name for name, phase in config.phase.phases.items() if phase.route_by is RouteBy.target]
    if by_target:
        raise ConfigError(
            f"phase.phases.{by_target[0]}.route_by=target has no target: the experts of "
            f"{KEY}={config.injection.experts_from} are for other rows than these, and none is free; use phase=joint, "
            "where all learn from the loss, or raise injection.num_experts and use phase=grow"
        )
    scale = mixture_scale(moe, config.injection)  # of one expert that of a router that is taught
    ordinary = MoeConfig()
    return replace(
        moe,
        router_target=RouterTarget.none,
        router_target_coef=ordinary.router_target_coef,
        router_fit_prompts=ordinary.router_fit_prompts,
        scale=scale,
    )


def target_lines(moe: MoeConfig, config: RunConfig, prepared: PreparedData) -> list[str]:
    """What the routers are taught, and why where router_target=auto has chosen it; nothing where they are to be taught
    none.

    Args:
        moe: with its targets decided.
        config, prepared: as of `with_targets`.
    """
    if moe.router_target is RouterTarget.none and config.moe.router_target is RouterTarget.auto:
        return [
            f"targets: none: the experts of {KEY}={config.injection.experts_from} are for other rows than these, so "
            "that routers learn from the loss alone"
        ]
    if moe.router_target is RouterTarget.none:
        return []
    names = moe.domains or []
    idle = [f"warning: {line}" for line in idle_balance(replace(config, moe=moe))]
    surplus = _surplus_lines(moe, config) + idle
    if moe.router_target is RouterTarget.domain:
        return [f"targets: {len(names)} domains: {names_of(names)}", *surplus]
    line = f"targets: {len(names)} clusters of prompts"
    if config.moe.router_target is RouterTarget.auto:
        domains, fewest = len(trained_domains(prepared)), config.injection.fewest_experts
        more = f"{domains} domains are more than the {fewest} experts of a site"
        line += f", because {'all training rows are of one domain' if domains == 1 else more}"
    return [line, *surplus]


def _surplus_lines(moe: MoeConfig, config: RunConfig) -> list[str]:
    """A warning where a target has more experts than a router chooses, and neither a target nor a balance says which of
    them; not where a run is taken over, which has been told.

    Args:
        moe: with its targets decided.
        config: of the run.
    """
    experts, count, top_k = config.injection.most_experts, target_count(moe), config.injection.top_k
    most, fewest = -(-experts // count), experts // count
    kind, by_router = moe.load_balance.type, not always_by_target(config.phase.phases.values())
    # A bias moves in phases alone that go by the router.
    balanced = by_router if kind is LoadBalanceType.aux_loss_free else kind is not LoadBalanceType.none
    fixed = moe.router is not None and ROUTERS[moe.router].fixed_k
    if balanced or not fixed or top_k >= most or source_run(config.injection):
        return []
    share = f"each target has {most}" if most == fewest else f"a target has {fewest} or {most}"
    routed = "a prompt" if needs_prompt(moe) else "a token"
    cure = f"injection.top_k={most}"
    if config.injection.num_experts_by_layer is None:
        cure = f"injection.num_experts={count} or {cure}"
    return [
        f"warning: {experts} experts for {count} targets: {share}, of which {routed} gets {top_k}, and nothing says "
        f"which, so that some may never train; set {cure}"
    ]


def trained_domains(prepared: PreparedData) -> list[str]:
    """Domains of the training rows; of a stream those of the first rows of its files."""
    if isinstance(prepared.train, RowStream):
        return prepared.train.first_domains(LOOKED_AT)
    rows = prepared.train_rows
    assert rows is not None
    return [prepared.domains[index] for index in rows.domains.unique().tolist()]


def _with_new(known: list[str], domains: list[str]) -> list[str]:
    return known + [domain for domain in domains if domain not in known]


def _domain_names(moe: MoeConfig, domains: list[str], known: list[str], fewest: int) -> list[str]:
    there = _with_new(known, domains)
    names = there if moe.domains is None else moe.domains
    if len(there) < 2:
        raise ConfigError(
            "moe.router_target=domain teaches routers to tell domains apart, and all training rows are of one: "
            f'{names_of(domains)}; give the rows a field "domain", or use router_target=cluster'
        )
    if missing := [name for name in domains if name not in names]:
        raise ConfigError(f"moe.domains names no target for {names_of(missing)} of the data; it has {names}")
    if len(names) <= fewest:
        return names
    needed = f"an expert for each of the {len(names)} domains ({names_of(names)}), and a site has {fewest}"
    if known:
        raise ConfigError(
            f"{KEY} brings experts that are for what they are called, and moe.router_target={moe.router_target} needs "
            f"{needed}: name the domains of the rows as the experts, raise injection.num_experts, or use moe=top_k, "
            "whose routers learn from the loss"
        )
    raise ConfigError(
        f"moe.router_target=domain needs {needed}; set injection.num_experts={len(names)}, or use router_target=auto, "
        "which takes clusters then"
    )


def _all_rows_known(config: RunConfig, prepared: PreparedData) -> bool:
    """Whether no row can come that is not among those of the first phase. Of a run that goes on nothing is asked: it
    may have its targets from another one.
    """
    return prepared.train_rows is not None and _one_set_of_rows(config) and config.resume is None


def _one_set_of_rows(config: RunConfig) -> bool:
    """Whether all phases learn from the same rows."""
    lessons = [lesson_of(config, name) for name in config.phase.phases]
    own_rows = any(phase.data for phase in config.phase.phases.values())
    return not own_rows and len(taught(lessons)[0]) == 1


def _check_named(names: list[str], there: list[str]) -> None:
    if missing := [name for name in names if name not in there]:
        what = "it" if len(missing) == 1 else "them"
        raise ConfigError(
            f"moe.domains names {names_of(missing)}, and no training row is of {what}: leave {what} out, or add rows. "
            f"A run that goes on from this one ({KEY}) finds experts for new domains by itself, where some are free"
        )


def _check_clusters(count: int, moe: MoeConfig, config: RunConfig, prepared: PreparedData) -> None:
    if moe.domains is not None:
        raise ConfigError(f"moe.domains={moe.domains} has no effect where clusters are the targets; leave it out")
    if not _one_set_of_rows(config):
        raise ConfigError(
            f"moe.router_target={config.moe.router_target} takes clusters here, which are of one set of rows, and not "
            "all phases learn from the same (phase.phases.<name>.data and task); give the rows of the first phase a "
            f'field "domain" with 2 to {config.injection.fewest_experts} names, or use {WITHOUT_TARGETS}'
        )
    rows = prepared.train_rows
    if rows is None:
        if roles := trained_base(config) - {Role.head}:  # which makes no states
            raise ConfigError(
                "data.streaming=true puts rows into clusters by what the base makes of them when they are read, and a "
                f"phase trains {', '.join(sorted(roles))} of it, so that it would make something else of them each "
                "time; use data.streaming=false, or moe.router_target=domain"
            )
    else:
        check_prompts(rows, count)
