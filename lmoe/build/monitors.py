"""Metrics that a plateau or early stopping waits for must be there, which only the rows can tell."""

from lmoe.data.prepare import PreparedData
from lmoe.errors import ConfigError
from lmoe.schema.callback_rules import early_stopping_monitors
from lmoe.schema.keys import near
from lmoe.schema.phase import PLATEAU
from lmoe.schema.phase_options import TRAIN_LOSS
from lmoe.schema.run import RunConfig


def check_monitors(config: RunConfig, prepared: PreparedData) -> None:
    """
    Raises:
        ConfigError: validations of these rows do not have a metric that is looked at.
    """
    measured = ["val/loss", *(f"val/{prepared.domains[d]}/loss" for d in prepared.val.domains.unique().tolist())]
    looked_at = early_stopping_monitors(config) | {
        f"phase.phases.{name}.plateau.monitor": phase.plateau.monitor
        for name, phase in config.phase.phases.items()
        if phase.start == PLATEAU and phase.plateau.monitor != TRAIN_LOSS
    }
    if problems := [
        f"{key}={name}: no validation measures it; {near(name, measured)}"
        for key, name in looked_at.items()
        if name not in measured
    ]:
        raise ConfigError(problems)
