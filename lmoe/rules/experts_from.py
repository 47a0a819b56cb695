"""`injection.experts_from`: adapters by name, or a run that grows."""

import re
from collections.abc import Mapping
from dataclasses import replace

from lmoe.config.injection import InjectionConfig
from lmoe.config.problems import without_effect
from lmoe.files.wording import quoted, shown
from lmoe.rules.strategies import STRATEGIES, with_adapter_experts
from lmoe.vocabulary import InitLora

KEY = "injection.experts_from"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""A name of an expert: also that of a folder, when experts are exported."""


def named_adapters(injection: InjectionConfig) -> dict[str, str]:
    """Adapter directories by the name of their expert, in the order of the experts; empty where it names none."""
    return dict(injection.experts_from) if isinstance(injection.experts_from, Mapping) else {}


def grown_run(injection: InjectionConfig) -> str | None:
    """The run or adapter whose experts are kept while new ones are added."""
    return injection.experts_from if isinstance(injection.experts_from, str) else None


def expert_places(injection: InjectionConfig) -> dict[str, str]:
    """Where the experts are, by key. A run that grows, and a name that the hub cannot have, are marked as paths."""
    if (run := grown_run(injection)) is not None:
        return {KEY: _as_path(run)}
    adapters = {name: place for name, place in named_adapters(injection).items() if isinstance(place, str)}
    return {f"{KEY}.{name}": place if "/" in place else _as_path(place) for name, place in adapters.items()}


def _as_path(place: str) -> str:
    return place if place.startswith((".", "/", "~")) or not place.strip() else f"./{place}"


def without_source(injection: InjectionConfig) -> InjectionConfig:
    """The section of a model whose experts have been filled in, or will be."""
    return replace(injection, experts_from=None)


def experts_from_problems(injection: InjectionConfig) -> list[str]:
    """Problems of `injection.experts_from`; what the directories hold is not looked at."""
    given, strategy = injection.experts_from, injection.strategy
    if given is None:
        return []
    problems = _shape_problems(given)
    if why := STRATEGIES[strategy].why_no_adapters:
        problems.append(f"{KEY} needs injection={with_adapter_experts()}; injection={strategy} {why}")
    if problems:
        return problems
    return _growth_problems(injection) if isinstance(given, str) else _import_problems(injection)


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


def _growth_problems(injection: InjectionConfig) -> list[str]:
    if injection.num_experts_by_layer:
        return [
            f"{KEY}={injection.experts_from} adds experts to every site alike; use injection.num_experts in place of "
            "injection.num_experts_by_layer"
        ]
    return []
