"""Sections of a config from plain dicts, completed from conf/."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmoe.errors import ConfigError
from lmoe.schema.injection import InjectionConfig, InjectionStrategy
from lmoe.schema.keys import unknown_keys
from lmoe.schema.moe import MoeConfig, RouterKind
from lmoe.schema.resources import resource_dir


def injection_section(given: Mapping[str, Any]) -> InjectionConfig:
    """An injection section; keys left out take the values of conf/injection/<strategy>.yaml, or of mixture_lora.yaml.

    Raises:
        ConfigError: unknown keys or wrong types.
    """
    strategy = str(given.get("strategy", InjectionStrategy.mixture_lora))
    shipped = strategy if strategy in tuple(InjectionStrategy) else InjectionStrategy.mixture_lora.value
    return _section("injection", InjectionConfig, shipped, given)


def moe_section(given: Mapping[str, Any]) -> MoeConfig:
    """A moe section; keys left out take the values of conf/moe/<router>.yaml, or of top_k.yaml.

    Raises:
        ConfigError: unknown keys or wrong types.
    """
    router = str(given.get("router", RouterKind.top_k))
    return _section("moe", MoeConfig, router if router in tuple(RouterKind) else RouterKind.top_k.value, given)


def _section(name: str, schema: type, default: str, given: Mapping[str, Any]) -> Any:
    if problems := unknown_keys(schema, given, prefix=name):
        raise ConfigError(problems)
    shipped = _shipped(name, schema, default)
    try:
        return OmegaConf.to_object(OmegaConf.merge(shipped, dict(given)) if given else shipped)
    except OmegaConfBaseException as error:
        where = f"{name}.{error.full_key}" if error.full_key else name
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None


@cache
def _shipped(name: str, schema: type, default: str) -> DictConfig:
    """A section as conf/ has it, read once; NOTE what is merged into it goes into a copy."""
    shipped = OmegaConf.load(resource_dir("conf") / name / f"{default}.yaml")
    assert isinstance(shipped, DictConfig)
    shipped.pop("defaults", None)  # for Hydra
    merged = OmegaConf.merge(OmegaConf.structured(schema), shipped)
    assert isinstance(merged, DictConfig)
    return merged
