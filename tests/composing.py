"""Compose conf/ as the command line does, without running anything; imports no torch."""

from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from lmoe.cli.hydra_run import to_object
from lmoe.schema.resources import resource_dir


def compose(config_name: str, schema: type, overrides: list[str]) -> Any:
    """The composed config as an object of the schema; not validated."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        composed = hydra_compose(config_name, overrides=overrides)
    return to_object(composed, schema, overrides)
