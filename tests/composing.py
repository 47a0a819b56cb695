"""Compose conf/ as the command line does, without running anything; imports no torch."""

from typing import Any

from lmoe.cli.compose import compose_config
from lmoe.cli.hydra_run import to_object
from lmoe.cli.overrides import first_point, read_command
from lmoe.config.problems import raise_problems


def compose(config_name: str, schema: type, overrides: list[str]) -> Any:
    """The composed config as an object of the schema; not validated.

    Raises:
        ConfigError: settings or values that cannot be read.
    """
    command = read_command(overrides, config_name, schema)
    raise_problems(command.problems)
    composed = compose_config(config_name, schema, first_point(command))
    return to_object(composed, schema, overrides, lambda _config: [])
