"""When a metric no longer falls."""

from types import SimpleNamespace

import pytest
import torch

from lmoe.config.phase import PlateauConfig
from lmoe.training.callbacks.plateau_start import PlateauStart
from lmoe.training.phases import PhaseSchedule

NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "begun"),
    [([NAN, 3.0, 2.0, 1.0], []), ([NAN, 3.0, 3.0, 3.0], [4]), ([3.0, NAN, NAN, NAN], [3]), ([NAN, NAN, NAN, 3.0], [])],
)
def test_a_look_that_is_no_number_is_none_to_fall_below_and_is_not_below_another(micro, losses, begun):
    config = micro.config("trainer.val_every_n_steps=1", "trainer.max_steps=20")
    config.phase.phases["experts"].start = "plateau"
    config.phase.phases["experts"].plateau = PlateauConfig(patience=2, latest="10")
    schedule, found = PhaseSchedule.of(config), []

    def begin(starts: dict[str, int]) -> None:
        found.extend(starts.values())
        module.phase = 1

    module = SimpleNamespace(phase=0, current=schedule[0], schedule=schedule, begin_phases=begin)
    watch = PlateauStart(lambda text: None)
    for step, loss in enumerate(losses, start=1):
        trainer = SimpleNamespace(global_step=step, callback_metrics={"val/loss": torch.tensor(loss)})
        watch.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert found == begun
