"""A config of `lmoe train` from its overrides, without a run."""

from lmoe.cli.compose import compose_config
from lmoe.cli.hydra_run import to_object
from lmoe.config.run import RunConfig
from lmoe.rules.validate import run_problems


def composed(overrides: list[str]) -> RunConfig:
    """The config of some settings, without problems."""
    return to_object(compose_config("train", RunConfig, overrides), RunConfig, overrides, run_problems)
