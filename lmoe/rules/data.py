"""What is wrong in the section `data`, as far as it shows without reading rows."""

from lmoe.config.data import BUNDLED, BUNDLED_FOLDERS, DataConfig, SourceConfig
from lmoe.config.injection import InjectionConfig
from lmoe.config.limits import DOMAIN_IN_WORDS, is_domain
from lmoe.config.moe import MoeConfig
from lmoe.config.problems import above_zero, at_least, without_effect
from lmoe.files.places import expanded, is_file, is_local, missing_file
from lmoe.files.wording import quoted
from lmoe.rules.experts_from import source_run
from lmoe.rules.routers import WITHOUT_TARGETS, Need, needs_domain, routers_that_need, trains_logits
from lmoe.rules.strategies import STRATEGIES
from lmoe.rules.template import template_problems
from lmoe.vocabulary import RouterTarget

FIELDS = (
    *("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output", "text"),
    *("system", "history", "tools", "chosen", "rejected", "label", "answer", "domain"),
)
"""Keys of a row that data.columns may name."""
_NAMES = " or ".join(BUNDLED_FOLDERS)


def data_problems(data: DataConfig) -> list[str]:
    """Problems of `data` that show without reading it."""
    problems = (
        at_least(data.max_length, 2, "data.max_length")
        + at_least(data.batch_size, 1, "data.batch_size")
        + at_least(data.num_workers, 0, "data.num_workers")
        + at_least(data.val_rows_per_domain, 0, "data.val_rows_per_domain")
    )
    if data.num_proc is not None:
        problems += at_least(data.num_proc, 1, "data.num_proc")
    if data.temperature is not None:
        problems += above_zero(data.temperature, "data.temperature")
    if data.domains is not None and (not data.domains or len(set(data.domains)) < len(data.domains)):
        problems.append(f"data.domains is {data.domains}, must be null or a list of different names")
    problems += _stream_problems(data)
    if data.sources:
        problems += source_problems(data)
    elif not data.path:
        problems.append(
            f"data.path is required: a file, a folder, a data set of the hub, {_NAMES}; or several in data.sources"
        )
    if not 0 < data.val_fraction < 1:
        problems.append(f"data.val_fraction is {data.val_fraction}, must be above 0 and below 1")
    if not data.splits_val:
        if data.val_fraction != DataConfig().val_fraction:
            problems.append("data.val_fraction has no effect where validation rows are given; leave it out")
        if data.split_seed is not None and not data.judge_fraction:
            problems.append("data.split_seed has no effect where validation rows are given; leave it out")
    problems += _judge_problems(data)
    if data.columns and (data.path == BUNDLED or data.sources) and data.val_path in (None, *BUNDLED_FOLDERS):
        where = "data.sources.<name>.columns names those of a source" if data.sources else "leave it out"
        problems.append(f"data.columns has no effect on these rows; {where}")
    if data.split_seed is not None and not 0 <= data.split_seed < 2**32:
        problems.append(f"data.split_seed is {data.split_seed}, must be from 0 to {2**32 - 1}")
    problems += column_problems(data.columns, "data.columns")
    if data.prompt_prefix == "":
        problems.append('data.prompt_prefix is empty and has no effect; give a text such as "[{domain}] ", or null')
    problems += template_problems(data.template_kwargs, data.template_date)
    return problems + missing_file("data.chat_template", data.chat_template)


def cluster_problems(data: DataConfig, moe: MoeConfig, injection: InjectionConfig) -> list[str]:
    """Problems of data.clusters, of clusters that are asked for, and of fewer experts than any rows have targets."""
    target, problems, fewest = moe.router_target, [], injection.fewest_experts
    taught = trains_logits(moe) and STRATEGIES[injection.strategy].own_routers and target is not RouterTarget.none
    # What goes on with the experts of a run may have no targets: they may be for other rows.
    may_have_none = target is RouterTarget.auto and source_run(injection) is not None
    if taught and fewest == 1 and not may_have_none:
        problems.append(
            f"moe.router_target={target} needs two experts at least, and a site has 1; raise injection.num_experts, or "
            f"use {WITHOUT_TARGETS}"
        )
    if data.clusters is not None and target not in (RouterTarget.cluster, RouterTarget.auto):
        why = f"with moe.router_target={target}; use router_target=cluster or auto"
        problems.append(without_effect("data.clusters", why))
    elif data.clusters is not None and data.clusters < 2:
        problems.append(f"data.clusters is {data.clusters}, must be at least 2")
    elif data.clusters is not None and data.clusters > fewest >= 1 and taught:
        problems.append(
            f"data.clusters={data.clusters} needs an expert for each cluster, and a site has {fewest}; set "
            f"injection.num_experts={data.clusters} or more, or lower data.clusters"
        )
    if target is RouterTarget.cluster and moe.domains is not None:
        problems.append(without_effect("moe.domains", "with moe.router_target=cluster, whose targets are clusters"))
    return problems


def _judge_problems(data: DataConfig) -> list[str]:
    """Problems of the rows that are kept for judging."""
    if not 0 <= data.judge_fraction < 1:
        return [f"data.judge_fraction is {data.judge_fraction}, must be from 0 to below 1"]
    if data.judge_fraction and data.judge_path is not None:
        return ["data.judge_path and data.judge_fraction are both set; give one of them"]
    if data.judge_fraction and data.streaming:
        return ["data.judge_fraction: no rows can be split off a stream; give data.judge_path"]
    return []


def data_warnings(data: DataConfig, moe: MoeConfig) -> list[str]:
    """What is allowed and perhaps not meant; call on a valid config."""
    by_domain = needs_domain(moe) or moe.router_target in (RouterTarget.domain, RouterTarget.auto)
    if not data.permute_domains or by_domain:
        return []
    router = "there is no router that chooses" if moe.router is None else f"moe.router={moe.router} does not choose"
    return [
        f"data.permute_domains=true: {router} by domain, so nothing changes but "
        f"what is measured by domain; it is meant for moe={routers_that_need(Need.domain)}"
    ]


def _stream_problems(data: DataConfig) -> list[str]:
    """Problems of rows that are read while training."""
    if not data.streaming:
        changed = data.shuffle_buffer != DataConfig().shuffle_buffer
        return [without_effect("data.shuffle_buffer", "without data.streaming=true")] if changed else []
    problems = at_least(data.shuffle_buffer, 1, "data.shuffle_buffer")
    if data.val_path is None:
        problems.append("data.streaming=true needs data.val_path: no rows can be split off a stream; set it")
    if data.is_bundled:
        problems.append("data.streaming=true: the bundled rows are few, and read at once; set data.streaming=false")
    if len(data.sources) > 1 and any(source.weight is None for source in data.sources.values()):
        problems.append(
            "data.streaming=true: how many rows a source has is not known, so each of data.sources needs a weight"
        )
    if data.permute_domains:
        problems.append(
            "data.permute_domains=true deals the domains among all rows, which a stream never has; set "
            "data.streaming=false, or data.permute_domains=false"
        )
    for name, given in (
        ("data.temperature", data.temperature is not None),
        ("data.num_workers", data.num_workers > 0),
        ("data.num_proc", data.num_proc is not None),
    ):
        problems += [without_effect(name, "with data.streaming=true")] * given
    return problems


def source_problems(data: DataConfig) -> list[str]:
    """Problems of several sources."""
    problems = []
    if data.path not in ("", BUNDLED):
        problems.append(f"data.path={data.path} and data.sources are both set; give one of them")
    domains: dict[str, str] = {}
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if not source.path:
            problems.append(f"{key}.path is required: a file, a folder, a data set of the hub, {_NAMES}")
        problems += _option_problems(source, key)
        problems += column_problems(source.columns, f"{key}.columns")
        if source.weight is not None:
            problems += at_least(source.weight, 0, f"{key}.weight")
        domain = name if source.domain is None else source.domain
        if not is_domain(domain):
            problems.append(f"{key}.domain must be {DOMAIN_IN_WORDS}; got {quoted(domain)}")
        if (other := domains.setdefault(domain, name)) != name:
            problems.append(f"{key}.domain is {domain}, which is the domain of data.sources.{other} too; name another")
    problems += _weight_problems(data)
    return problems


def _option_problems(source: SourceConfig, key: str) -> list[str]:
    """Options of a data set that its path has no use for."""
    usual, problems = SourceConfig(), []
    if source.path in BUNDLED_FOLDERS or is_local(source.path):
        why = f"on {source.path}, which is no data set of the hub"
        problems += [
            without_effect(f"{key}.{name}", why)
            for name in ("config", "revision")
            if getattr(source, name) != getattr(usual, name)
        ]
        if source.split != usual.split and (source.path in BUNDLED_FOLDERS or is_file(expanded(source.path))):
            problems.append(without_effect(f"{key}.split", f"on {source.path}, which has no splits"))
    return problems


def _weight_problems(data: DataConfig) -> list[str]:
    weights = [source.weight for source in data.sources.values() if source.weight is not None]
    without = [name for name, source in data.sources.items() if source.weight is None]
    problems = []
    if weights and without:
        problems.append(
            f"data.sources.{without[0]}.weight is null, and other sources have a weight; give all of them one, or none"
        )
    elif weights and not any(weights):
        problems.append("data.sources: all weights are 0; give at least one source a weight above 0")
    if weights and len(data.sources) == 1:
        problems.append("data.sources: a weight has no effect on the only source; leave it out")
    if weights and data.temperature is not None:
        problems.append("data.temperature and the weights of data.sources both mix the rows; give one of them")
    return problems


def column_problems(columns: dict[str, str], key: str) -> list[str]:
    """Problems of a mapping from our keys of a row to those of a data set."""
    problems = [
        f"{key}.{name}: no row has such a key; allowed: {', '.join(FIELDS)}" for name in columns if name not in FIELDS
    ]
    doubled = [theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1]
    if doubled:
        problems.append(f"{key} takes {doubled[0]!r} twice")
    return problems
