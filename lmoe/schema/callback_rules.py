"""Which callbacks of Lightning a run may add."""

from lmoe.schema.run import RunConfig

PREFIX, EARLY_STOPPING = "lightning.pytorch.callbacks.", "EarlyStopping"
_WRITES = "writes checkpoints, which checkpoint=… decides"
_TRAINS = "decides what trains, which the phases do"
_STEPS = "changes the batches or the learning rate of a step, which data, trainer, optim and the phases decide"
_WEIGHTS = "changes weights outside the optimizer, so that a resumed run would be another one"
REFUSED = {
    "ModelCheckpoint": _WRITES,
    "OnExceptionCheckpoint": _WRITES,
    "BackboneFinetuning": _TRAINS,
    "BaseFinetuning": _TRAINS,
    "GradientAccumulationScheduler": _STEPS,
    "BatchSizeFinder": _STEPS,
    "LearningRateFinder": _STEPS,
    "ModelPruning": _WEIGHTS,
    "StochasticWeightAveraging": _WEIGHTS,
    "WeightAveraging": _WEIGHTS,
    "EMAWeightAveraging": _WEIGHTS,
}
"""Why a callback cannot work here, by class."""


def callback_problems(config: RunConfig) -> list[str]:
    """Problems of `callbacks` that show without making them."""
    problems = []
    for name, settings in config.callbacks.items():
        target = settings.get("_target_") if isinstance(settings, dict) else None
        if not isinstance(target, str) or not target.startswith(PREFIX):
            problems.append(f"callbacks.{name}._target_ is {target!r}; allowed: {PREFIX}<class>")
            continue
        class_name = target.removeprefix(PREFIX)
        if class_name in REFUSED:
            problems.append(f"callbacks.{name}: {class_name} {REFUSED[class_name]}; leave it out")
        elif class_name == EARLY_STOPPING and config.trainer.val_every_n_steps == 0:
            problems.append(f"callbacks.{name} looks at validations: set trainer.val_every_n_steps above 0")
    return problems


def early_stopping_monitors(config: RunConfig) -> dict[str, str]:
    """What early stopping looks at, by the key that says so; of a config without problems."""
    return {
        f"callbacks.{name}.monitor": str(settings["monitor"])
        for name, settings in config.callbacks.items()
        if settings["_target_"] == f"{PREFIX}{EARLY_STOPPING}" and "monitor" in settings
    }
