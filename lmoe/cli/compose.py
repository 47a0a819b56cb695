"""What Hydra makes of conf/ and the settings of a command: values without types, which we read ourselves."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lmoe.config.read import independent, read_section
from lmoe.files.resources import resource_dir
from lmoe.files.run_folder import name_problems
from lmoe.files.small_file import texts
from lmoe.files.wording import shown

MAKES = ("_target_", "()", "class", "factory")
"""Keys of Hydra's section, and of logging's in it, whose value is imported and called."""
HYDRAS_OWN = ("hydra.", "hydra_plugins.", "logging.")
Check = Callable[[Any], list[str]]
"""Gives the problems of a config."""


def store_defaults(config_name: str, schema: type) -> None:
    """Make the defaults of a schema known to Hydra as the first part of conf/<config_name>.yaml.

    NOTE without their types: with them Hydra would stop at the first value that does not fit, in words of its own.
    """
    defaults = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    ConfigStore.instance().store(name=f"{config_name}_schema", node=defaults)


def compose_config(config_name: str, schema: type, overrides: Iterable[str]) -> DictConfig:
    """What a command with these overrides would compose, without running anything."""
    store_defaults(config_name, schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(resource_dir("conf").resolve()), version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


def problems_of_choices(config_name: str, overrides: Iterable[str], named: Collection[str]) -> list[str]:
    """What files in folders that are not conf/ would have Hydra itself do before anything of ours runs: make objects
    of classes that they name, and a folder elsewhere.

    Args:
        overrides: of one job.
        named: keys that the command line sets itself.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(resource_dir("conf").resolve()), version_base="1.3"):
        config = compose(config_name, overrides=list(overrides), return_hydra_config=True)
    own = OmegaConf.to_container(config.hydra, resolve=False)
    problems = [
        f"hydra.{key} is {shown(value)} in a file of another folder; a class that a file names is not made, but where "
        f"this command line says hydra.{key}=…"
        for key, value in texts(own)
        if key.rpartition(".")[2] in MAKES and not value.startswith(HYDRAS_OWN) and f"hydra.{key}" not in named
    ]
    return problems + name_problems(str(config.get("name")))


def problems_of(config: DictConfig, schema: type, check: Check) -> tuple[Any, list[str]]:
    """The config as an object of the schema, and every problem of it: what cannot be read, then what cannot be."""
    read, reading = read_section(schema, config)
    return read, reading.problems + independent(check(read), reading.unread)
