"""`injection.experts_from`: adapters by name, or a run that trains on or grows."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.problems import without_effect
from lmoe.errors import LmoeError
from lmoe.files.adapter_files import ADAPTER_DIR, CONFIG_FILE
from lmoe.files.places import expanded, is_file
from lmoe.files.small_file import read_json
from lmoe.files.wording import quoted, shown
from lmoe.rules.routers import ROUTERS
from lmoe.rules.strategies import STRATEGIES, with_adapter_experts
from lmoe.vocabulary import InitLora, Mixing, RouterKind, RouterScope, RouterTarget

KEY = "injection.experts_from"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""A name of an expert: also that of a folder, when experts are exported."""
SUPERVISED = "supervised"
"""The group conf/moe/supervised.yaml, of a router that decides for the whole model and learns."""


def named_adapters(injection: InjectionConfig) -> dict[str, str]:
    """Adapter directories by the name of their expert, in the order of the experts; empty where it names none."""
    return dict(injection.experts_from) if isinstance(injection.experts_from, Mapping) else {}


def source_run(injection: InjectionConfig) -> str | None:
    """The run or adapter that is taken over: it trains on, or grows where the config has more experts."""
    return injection.experts_from if isinstance(injection.experts_from, str) else None


def grown_run(injection: InjectionConfig) -> str | None:
    """The run or adapter whose experts are kept while new ones are added; None also where it cannot be read, which is
    refused when it is taken over."""
    run = source_run(injection)
    count = None if run is None else stored_injection(run).get("num_experts")
    return run if isinstance(count, int) and count < injection.num_experts else None


def stored_injection(run: str) -> dict[str, Any]:
    """The section `injection` of the adapter of a local run, as it stands there; {}: it cannot be read."""
    return _stored(run, "injection")


def _stored(run: str, name: str) -> dict[str, Any]:
    for folder in (expanded(run), expanded(run) / ADAPTER_DIR):
        if is_file(folder / CONFIG_FILE):
            try:
                section = read_json(folder / CONFIG_FILE).get(name)
            except LmoeError:
                return {}
            return section if isinstance(section, dict) else {}
    return {}


def base_training_problem(run: str, roles: Iterable[str]) -> str:
    """The problem of a phase that trains parts of the backbone on which kept experts rest."""
    return (
        f"{KEY}={run} keeps experts as they are, and they rest on the backbone: no phase may train "
        f"{', '.join(sorted(roles))}; take it out of phase.phases.<name>.trainable"
    )


def expert_places(injection: InjectionConfig) -> dict[str, str]:
    """Where the experts are, by key; a name that the hub cannot have is marked as a path."""
    if (run := source_run(injection)) is not None:
        return {KEY: _as_place(run)}
    adapters = {name: place for name, place in named_adapters(injection).items() if isinstance(place, str)}
    return {f"{KEY}.{name}": _as_place(place) for name, place in adapters.items()}


def _as_place(place: str) -> str:
    return place if "/" in place or place.startswith((".", "~")) or not place.strip() else f"./{place}"


def without_source(injection: InjectionConfig) -> InjectionConfig:
    """The section of a model whose experts have been filled in, or will be."""
    return replace(injection, experts_from=None)


def experts_from_problems(injection: InjectionConfig) -> list[str]:
    """Problems of `injection.experts_from`; of what the directories hold, only the settings of a run are looked at."""
    given, strategy = injection.experts_from, injection.strategy
    if given is None:
        return []
    problems = _shape_problems(given)
    if (why := STRATEGIES[strategy].why_no_adapters) and isinstance(given, Mapping):
        problems.append(f"{KEY} needs injection={with_adapter_experts()}; injection={strategy} {why}")
    if problems:
        return problems
    return _run_problems(injection) if isinstance(given, str) else _import_problems(injection)


def source_router_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Problems of routers beside experts that exist, and have routers, or names, of their own."""
    if moe.mixing is Mixing.factors and (problem := _factors_problem(injection)):
        return [problem]
    if named_adapters(injection) and moe.router_target is RouterTarget.cluster:
        return [
            f"{KEY} brings experts that are for what they are called, and moe.router_target=cluster would deal them to "
            "clusters of prompts; use domain, with rows whose domains are called like the experts, or moe=top_k"
        ]
    run = source_run(injection)
    if run is None or not STRATEGIES[injection.strategy].own_routers:
        return []
    theirs, ours = _kind(_stored(run, "moe")), _kind(asdict(moe))
    if theirs == ours or theirs[0] not in tuple(RouterKind):
        return []
    router, of_model = theirs
    group = SUPERVISED if of_model and ROUTERS[RouterKind(router)].trains else router
    return [f"{KEY}={run} was made with other routers, which go on with it; set moe={group}"]


def _factors_problem(injection: InjectionConfig) -> str | None:
    """Experts that were made apart would act upon one another: lora_B of each on lora_A of the others, which is random
    where an expert adds nothing."""
    why = "moe.mixing=factors multiplies the lora_B of each expert with the lora_A of all"
    if named_adapters(injection):
        return f"{KEY} brings adapters that are each something by itself, and {why}; use moe.mixing=outputs"
    if (run := grown_run(injection)) is not None:
        return (
            f"{KEY}={run} keeps experts as they are, and {why}, so that a new one changes them; train the run on with "
            f"injection.num_experts={stored_injection(run)['num_experts']}"
        )
    return None


def _kind(section: Mapping[str, Any]) -> tuple[Any, bool]:
    """The router of a section, and whether it decides for the whole model."""
    return section.get("router"), section.get("router_scope") == RouterScope.model


def _shape_problems(given: object) -> list[str]:
    allowed = "allowed: {name: DIR, …} with an adapter for each expert, one run or adapter directory, or null"
    if isinstance(given, str):
        return [] if given.strip() else [f"{KEY} is empty; {allowed}"]
    if not isinstance(given, Mapping):
        return [f"{KEY} is {quoted(given)}; {allowed}"]
    if not given:
        return [f"{KEY} names no adapter; {allowed}"]
    problems = [
        f"{KEY}: {quoted(name)} cannot be the name of an expert; allowed: up to 64 letters, digits and . _ -, first a "
        "letter or digit"
        for name in given
        if not (isinstance(name, str) and NAME.fullmatch(name))
    ]
    folded = [str(name).casefold() for name in given]
    problems += [
        f"{KEY} names {shown(name)} twice but for case" for name in sorted({n for n in folded if folded.count(n) > 1})
    ]
    return problems + [
        f"{KEY}.{name} is {quoted(place)}, must be a directory"
        for name, place in given.items()
        if not (isinstance(place, str) and place.strip())
    ]


def _import_problems(injection: InjectionConfig) -> list[str]:
    adapters, problems = named_adapters(injection), []
    key, counts = "num_experts", [injection.num_experts]
    if injection.num_experts_by_layer:
        key, counts = "num_experts_by_layer", injection.num_experts_by_layer
    if len(adapters) > min(counts) >= 1:
        problems.append(
            f"{KEY} names {len(adapters)} adapters, and injection.{key} leaves room for {min(counts)} at a site; set "
            f"injection.{key}={len(adapters) if key == 'num_experts' else [max(c, len(adapters)) for c in counts]}"
        )
    if injection.lora_B_std and len(adapters) >= max(counts):
        problems.append(without_effect("injection.lora_B_std", f"where every expert comes from {KEY}"))
    if injection.shared_lora_A:
        problems.append(f"{KEY} brings a lora_A for each adapter; set injection.shared_lora_A=false")
    if injection.init_lora is InitLora.svd:
        problems.append(f"{KEY} is how experts start, and so is injection.init_lora=svd; use one of them")
    return problems


def _run_problems(injection: InjectionConfig) -> list[str]:
    stored, by_layer = stored_injection(injection.experts_from), injection.num_experts_by_layer
    theirs, why = stored.get("strategy"), STRATEGIES[injection.strategy].why_no_adapters
    if why and isinstance(theirs, str) and theirs != injection.strategy:
        return [f"{KEY} needs injection={shown(theirs)}; injection={injection.strategy} {why}"]
    if by_layer and stored.get("num_experts_by_layer") != by_layer:
        return [
            f"{KEY}={injection.experts_from} adds experts to every site alike; use injection.num_experts in place of "
            "injection.num_experts_by_layer"
        ]
    return []
