"""A callback that cannot work is refused before anything is loaded, by what Lightning's source says of it."""

import importlib
import inspect

import pytest

from lmoe.config.run import RunConfig
from lmoe.rules.callbacks import PREFIX, REFUSED, callback_problems
from lmoe.rules.lightning_callbacks import callback_arguments, exported_callbacks

STOPPING = {"_target_": f"{PREFIX}EarlyStopping", "monitor": "val/loss"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"_target_": f"{PREFIX}RichProgressBar"}, "callbacks.mine: RichProgressBar draws a progress line"),
        ({"_target_": f"{PREFIX}LambdaCallback"}, "callbacks.mine: LambdaCallback is made with Python functions"),
        ({"_target_": f"{PREFIX}EarlyStoping"}, "no such callback; did you mean EarlyStopping?"),
        ({"_target_": f"{PREFIX}EarlyStopping"}, "callbacks.mine.monitor is required by EarlyStopping"),
        (STOPPING | {"min_delta": "a"}, "callbacks.mine.min_delta is a, must be a number"),
        (STOPPING | {"patience": "abc"}, "callbacks.mine.patience is abc, must be a whole number"),
        (STOPPING | {"patience": None}, "callbacks.mine.patience is null, must be a whole number"),
        (STOPPING | {"patience": -1}, "callbacks.mine.patience is -1, must be at least 0"),
        (STOPPING | {"patience": [[1]]}, "callbacks.mine.patience is [[1]], must be a whole number"),
        (STOPPING | {"patienc": 3}, "callbacks.mine.patienc: EarlyStopping has no such argument; did you mean"),
        (STOPPING | {"mode": "up"}, "callbacks.mine.mode is up; allowed: min, max"),
        (STOPPING | {"check_on_train_epoch_end": True}, "callbacks.mine.check_on_train_epoch_end=true: a run is"),
        (
            {"_target_": f"{PREFIX}LearningRateMonitor", "logging_interval": "hour"},
            "callbacks.mine.logging_interval is hour, must be 'step' or 'epoch' or null",
        ),
    ],
)  # fmt: skip
def test_a_callback_that_cannot_work_is_refused(settings, said):
    config = RunConfig(callbacks={"mine": settings})
    (problem,) = callback_problems(config)
    assert said in problem


@pytest.mark.parametrize("more", [{}, {"patience": 0}, {"min_delta": 1, "stopping_threshold": None, "verbose": True}])
def test_a_callback_that_works_is_taken(more):
    assert callback_problems(RunConfig(callbacks={"mine": STOPPING | more})) == []


def test_the_arguments_read_from_the_source_are_those_of_the_classes():
    """The dumb way: import Lightning and ask."""
    module = importlib.import_module(PREFIX.rstrip("."))
    usable = [name for name in exported_callbacks() if name not in REFUSED]
    assert len(usable) >= 6
    for name in usable:
        arguments = callback_arguments(name)
        if arguments is None:
            continue
        real = inspect.signature(getattr(module, name)).parameters
        assert {key: argument.required for key, argument in arguments.items()} == {
            key: parameter.default is inspect.Parameter.empty for key, parameter in real.items()
        }, name
