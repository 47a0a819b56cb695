"""Sections of a config from plain dicts, completed from conf/."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.problems import raise_problems
from lmoe.config.read import Section, no_mapping, read_section
from lmoe.errors import ConfigError
from lmoe.files.resources import resource_dir
from lmoe.vocabulary import InjectionStrategy, RouterKind


def injection_section(given: Mapping[str, Any]) -> InjectionConfig:
    """An injection section; keys left out take the values of conf/injection/<strategy>.yaml, or of mixture_lora.yaml.

    Raises:
        ConfigError: no mapping, unknown keys or wrong types.
    """
    _check_mapping("injection", InjectionConfig, given)
    strategy = str(given.get("strategy", InjectionStrategy.mixture_lora))
    shipped = strategy if strategy in tuple(InjectionStrategy) else InjectionStrategy.mixture_lora.value
    return _section("injection", InjectionConfig, shipped, given)


def moe_section(given: Mapping[str, Any]) -> MoeConfig:
    """A moe section; keys left out take the values of conf/moe/<router>.yaml, or of top_k.yaml.

    Raises:
        ConfigError: no mapping, unknown keys or wrong types.
    """
    _check_mapping("moe", MoeConfig, given)
    router = str(given.get("router", RouterKind.top_k))
    return _section("moe", MoeConfig, router if router in tuple(RouterKind) else RouterKind.top_k.value, given)


def _check_mapping(name: str, schema: type, given: object) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(no_mapping(schema, given, name))


def _section(name: str, schema: type[Section], default: str, given: Mapping[str, Any]) -> Section:
    section, reading = read_section(schema, _merged(_shipped(name, default), given), prefix=name)
    raise_problems(reading.problems)
    return section


def _merged(usual: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the given first; mappings are merged. NOTE not by OmegaConf, which would resolve what looks like ${…}."""
    merged = dict(usual) | dict(given)
    both = [name for name in given if isinstance(given[name], Mapping) and isinstance(usual.get(name), Mapping)]
    return merged | {name: _merged(usual[name], given[name]) for name in both}


@cache
def _shipped(name: str, default: str) -> dict[str, Any]:
    """A section as conf/ has it, read once."""
    shipped = OmegaConf.to_container(OmegaConf.load(resource_dir("conf") / name / f"{default}.yaml"))
    assert isinstance(shipped, dict)
    return {str(key): value for key, value in shipped.items() if key != "defaults"}  # those are for Hydra
