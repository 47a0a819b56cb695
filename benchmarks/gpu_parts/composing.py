"""A config of `lmoe train` from its overrides, without a run."""

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from lmoe.cli.hydra_run import to_object
from lmoe.schema.resources import resource_dir
from lmoe.schema.run import RunConfig
from lmoe.schema.validate import validate


def composed(overrides: list[str]) -> RunConfig:
    """Validated."""
    ConfigStore.instance().store(name="train_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        config = to_object(compose("train", overrides=overrides), RunConfig, overrides)
    validate(config)
    return config
