"""What the routers of a run are taught, once its rows are known: domains, or clusters of prompts."""

from dataclasses import replace

from lmoe.config.moe import MoeConfig
from lmoe.config.run import RunConfig
from lmoe.data.domains import names_of
from lmoe.data.prepare import PreparedData
from lmoe.errors import ConfigError
from lmoe.rules.routers import cluster_names
from lmoe.vocabulary import RouterTarget


def with_targets(moe: MoeConfig, config: RunConfig, prepared: PreparedData) -> MoeConfig:
    """The section with router_target decided, and the names of the targets in `domains`.

    Args:
        moe: of the config.
        config: of the run.
        prepared: its rows.

    Raises:
        ConfigError: no targets can be made of these rows, or more than a site has experts.
    """
    if moe.router_target is RouterTarget.none:
        return moe
    fewest = config.injection.fewest_experts
    domains = trained_domains(prepared)
    target = moe.router_target
    if target is RouterTarget.auto:
        target = RouterTarget.domain if 2 <= len(domains) <= fewest else RouterTarget.cluster
    names = _domain_names(moe, domains, fewest) if target is RouterTarget.domain else _cluster_names(config, fewest)
    if target is RouterTarget.domain and config.data.clusters is not None:
        raise ConfigError(
            f"data.clusters={config.data.clusters} has no effect: the rows name {len(domains)} domains, which "
            "moe.router_target=auto takes; use router_target=cluster, or leave it out"
        )
    if target is RouterTarget.cluster:
        _check_clusters(len(names), moe, prepared)
    return replace(moe, router_target=target, domains=names)


def target_lines(moe: MoeConfig, config: RunConfig, prepared: PreparedData) -> list[str]:
    """What the routers are taught, and why where router_target=auto has chosen it; nothing where they are taught none.

    Args:
        moe: with its targets decided.
        config, prepared: as of `with_targets`.
    """
    if moe.router_target is RouterTarget.none:
        return []
    names = moe.domains or []
    if moe.router_target is RouterTarget.domain:
        return [f"targets: {len(names)} domains: {names_of(names)}"]
    line = f"targets: {len(names)} clusters of prompts"
    if config.moe.router_target is RouterTarget.auto:
        domains, fewest = len(trained_domains(prepared)), config.injection.fewest_experts
        more = f"{domains} domains are more than the {fewest} experts of a site"
        line += f", because {'all training rows are of one domain' if domains == 1 else more}"
    return [line]


def trained_domains(prepared: PreparedData) -> list[str]:
    """Domains of the training rows; of a stream those of all rows."""
    rows = prepared.train_rows
    if rows is None:
        return list(prepared.domains)
    return [prepared.domains[index] for index in rows.domains.unique().tolist()]


def _domain_names(moe: MoeConfig, domains: list[str], fewest: int) -> list[str]:
    names = list(domains) if moe.domains is None else moe.domains
    if len(domains) < 2:
        raise ConfigError(
            "moe.router_target=domain teaches routers to tell domains apart, and all training rows are of one: "
            f'{names_of(domains)}; give the rows a field "domain", or use router_target=cluster'
        )
    if missing := [name for name in domains if name not in names]:
        raise ConfigError(f"moe.domains names no target for {names_of(missing)} of the data; it has {names}")
    if fewest < len(names):
        raise ConfigError(
            f"moe.router_target=domain needs an expert for each of the {len(names)} domains ({names_of(names)}), and a "
            f"site has {fewest}; set injection.num_experts={len(names)}, or use router_target=auto, which takes "
            "clusters then"
        )
    return names


def _cluster_names(config: RunConfig, fewest: int) -> list[str]:
    count = fewest if config.data.clusters is None else config.data.clusters
    if count > fewest:
        raise ConfigError(
            f"data.clusters={count} needs an expert for each cluster, and a site has {fewest}; set "
            f"injection.num_experts={count} or more, or lower data.clusters"
        )
    if count < 2:
        raise ConfigError(
            f"moe.router_target=cluster needs two experts at least, and a site has {fewest}; raise "
            "injection.num_experts"
        )
    return cluster_names(count)


def _check_clusters(count: int, moe: MoeConfig, prepared: PreparedData) -> None:
    if moe.domains is not None:
        raise ConfigError(f"moe.domains={moe.domains} has no effect where clusters are the targets; leave it out")
    rows = prepared.train_rows
    if rows is None:
        raise ConfigError(
            "moe.router_target=auto takes clusters here, which need all training rows before the first step, and "
            "data.streaming=true reads them while training; give the rows domains (no more than there are experts), "
            "or use streaming=false"
        )
    if len(rows) < count:
        raise ConfigError(
            f"{len(rows)} training rows cannot be put into {count} clusters; lower data.clusters (null: "
            "injection.num_experts), or add rows"
        )
