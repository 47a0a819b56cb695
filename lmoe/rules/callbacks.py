"""Which callbacks a run may add: Lightning's, and those of a module that the command line names."""

from pathlib import PurePath
from typing import Any

from lmoe.config.keys import near
from lmoe.config.run import RunConfig
from lmoe.files.wording import quoted, shown
from lmoe.rules.lightning_callbacks import PACKAGE, callback_arguments, exported_callbacks

PREFIX, EARLY_STOPPING = f"{PACKAGE}.", "EarlyStopping"
_WRITES = "writes checkpoints, which checkpoint=… decides"
_TRAINS = "decides what trains, which the phases do"
_STEPS = "changes the batches or the learning rate of a step, which data, trainer, optim and the phases decide"
_LINE = "draws a progress line, and trainer.enable_progress_bar draws the one of a run"
_FUNCTIONS = "is made with Python functions, which a config cannot hold"
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
    "ProgressBar": _LINE,
    "RichProgressBar": _LINE,
    "TQDMProgressBar": _LINE,
    "LambdaCallback": _FUNCTIONS,
    "ThroughputMonitor": _FUNCTIONS,
    "BasePredictionWriter": "writes predictions, and a run makes none",
}
"""Why a callback cannot work here, nor one that is derived from it, by class."""
BASES = dict.fromkeys(("Callback", "Checkpoint"), "does nothing by itself")
"""What callbacks are derived from."""


def callback_problems(config: RunConfig) -> list[str]:
    """Problems of `callbacks` that show without making them."""
    problems = []
    for name, settings in config.callbacks.items():
        target = settings.get("_target_") if isinstance(settings, dict) else None
        if isinstance(target, str) and own_class(target, config.callbacks_from) is not None:
            continue
        if not isinstance(target, str) or not target.startswith(PREFIX):
            own = "<module>.<class> with callbacks_from=<module> on this command line"
            if config.callbacks_from:
                own = f"{own_module(config.callbacks_from)}.<class>"
            problems.append(f"callbacks.{name}._target_ is {quoted(target)}; allowed: {PREFIX}<class>, or {own}")
            continue
        class_name = target.removeprefix(PREFIX)
        known = exported_callbacks()
        refused = REFUSED | BASES
        if class_name in refused:
            problems.append(f"callbacks.{name}: {class_name} {refused[class_name]}; leave it out")
        elif known and class_name not in known:
            can = [found for found in known if found not in refused]
            problems.append(f"callbacks.{name}._target_={target}: no such callback; {near(class_name, can)}")
        elif known:
            problems += _argument_problems(f"callbacks.{name}", class_name, settings)
        if class_name == EARLY_STOPPING:
            problems += _early_stopping_problems(f"callbacks.{name}", settings, config)
    return problems


def _argument_problems(key: str, class_name: str, settings: dict[str, Any]) -> list[str]:
    """What the constructor would not take."""
    arguments = callback_arguments(class_name)
    if arguments is None:
        return []
    problems = [
        f"{key}.{name} is required by {class_name}"
        for name, argument in arguments.items()
        if argument.required and name not in settings
    ]
    for name, value in settings.items():
        if name == "_target_":
            continue
        if name not in arguments:
            cure = near(str(name), list(arguments)) if arguments else "it takes none"
            problems.append(f"{key}.{name}: {class_name} has no such argument; {cure}")
        elif (must := arguments[name].problem(value)) is not None:
            problems.append(f"{key}.{name} is {shown(value)}, must be {must}")
    return problems


def _early_stopping_problems(key: str, settings: dict[str, Any], config: RunConfig) -> list[str]:
    problems = []
    if config.trainer.val_every_n_steps == 0:
        problems.append(f"{key} looks at validations: set trainer.val_every_n_steps above 0")
    patience = settings.get("patience")
    if isinstance(patience, int) and patience < 0:
        problems.append(f"{key}.patience is {patience}, must be at least 0")
    if settings.get("mode", "min") not in ("min", "max"):
        problems.append(f"{key}.mode is {shown(settings['mode'])}; allowed: min, max")
    if settings.get("check_on_train_epoch_end"):
        problems.append(
            f"{key}.check_on_train_epoch_end=true: a run is one epoch, so it would never look; leave it out"
        )
    return problems


def own_module(callbacks_from: str) -> str:
    """Name of the module that callbacks_from names: of a file, its name without .py."""
    return PurePath(callbacks_from).stem if callbacks_from.endswith(".py") else callbacks_from


def own_class(target: str, callbacks_from: str | None) -> str | None:
    """The class in the user's own module that a _target_ names, or None."""
    if not callbacks_from:
        return None
    module, _, name = target.rpartition(".")
    return name if module == own_module(callbacks_from) and name.isidentifier() else None


def callbacks_from_problems(config: RunConfig) -> list[str]:
    """Problems of `callbacks_from`, whose code is run (rules/trust.py: where the command line says so)."""
    given = config.callbacks_from
    if given is None:
        return []
    targets = [entry.get("_target_") for entry in config.callbacks.values() if isinstance(entry, dict)]
    if not any(isinstance(target, str) and own_class(target, given) for target in targets):
        return [
            f"callbacks_from={given} has no effect: no callback is of it; add "
            f"+callbacks.<name>._target_={own_module(given)}.<class>"
        ]
    return []


def early_stopping_monitors(config: RunConfig) -> dict[str, str]:
    """What early stopping looks at, by the key that says so; of a config without problems."""
    return {
        f"callbacks.{name}.monitor": str(settings["monitor"])
        for name, settings in config.callbacks.items()
        if settings["_target_"] == f"{PREFIX}{EARLY_STOPPING}" and "monitor" in settings
    }
