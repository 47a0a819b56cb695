"""Metrics that a plateau or early stopping waits for must be there, which only the rows can tell."""

from lmoe.config.keys import near
from lmoe.config.phase import PLATEAU
from lmoe.config.run import RunConfig
from lmoe.data.prepare import PreparedData
from lmoe.errors import ConfigError
from lmoe.rules.callbacks import early_stopping_monitors
from lmoe.rules.phase_options import TRAIN_LOSS


def check_monitors(config: RunConfig, prepared: PreparedData) -> None:
    """Refuse to look at a metric that no validation measures.

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
