"""A config of `lmoe train` from its overrides, without a run."""

from lmoe.cli.compose import compose_config
from lmoe.cli.hydra_run import to_object
from lmoe.schema.run import RunConfig
from lmoe.schema.validate import run_problems


def composed(overrides: list[str]) -> RunConfig:
    """Without problems."""
    return to_object(compose_config("train", RunConfig, overrides), RunConfig, overrides, run_problems)
