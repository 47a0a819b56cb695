"""Compose conf/ as the command line does, without running anything; imports no torch."""

from typing import Any

from lmoe.cli import compose as composition
from lmoe.cli.hydra_run import to_object


def compose(config_name: str, schema: type, overrides: list[str]) -> Any:
    """The composed config as an object of the schema; not validated."""
    return to_object(composition.compose_config(config_name, schema, overrides), schema, overrides, lambda _config: [])
