"""trainer.max_epochs: the length of a run in passes over its rows."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from lmoe.config.run import RunConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import ConfigError
from lmoe.resume.stopping import Stopped
from lmoe.rules.validate import run_problems
from tests.metric_names import rows

LENGTH = "trainer.max_steps=150"
"""The default: the command gives no number of steps."""


def problems(micro, *overrides: str) -> str:
    """What is wrong with such a config."""
    from tests.composing import compose

    return "\n".join(run_problems(compose("train", RunConfig, micro.changed(*overrides))))


def test_a_length_in_passes_is_worked_out_recorded_and_phases_are_laid_out_for_it(micro):
    parts = micro.parts(LENGTH, "trainer.max_epochs=1.5", "trainer.accumulate_grad_batches=2")
    steps = math.ceil(1.5 * len(parts.prepared.train) / 8)
    assert parts.config.trainer.max_steps == steps != 150
    assert parts.config.trainer.max_epochs == 1.5
    first, second = parts.module.schedule.phases
    assert (first.end, second.end) == (math.ceil(steps / 3), steps)


def test_a_run_writes_the_steps_down_and_ends_with_them(train, micro):
    done = train(LENGTH, "trainer.max_epochs=0.5", "data.batch_size=8")
    assert done.code == 0, done.text
    saved = yaml.safe_load((done.run / "config.yaml").read_text())
    samples = len(micro.parts().prepared.train)
    assert saved["trainer"]["max_steps"] == math.ceil(samples / 16)
    assert f"{saved['trainer']['max_steps']}" in done.text


def steps_of(run: Path) -> int:
    """The length of a run that its config records."""
    return yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"]


def test_a_run_ended_before_its_rows_were_read_has_its_passes_when_it_is_started_again(train, micro, monkeypatch):
    given = (LENGTH, "trainer.max_epochs=0.5", "data.batch_size=8", "phase.phases.experts.start=1")

    def ended(*arguments: object) -> None:
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("lmoe.run.parts.read_lessons", ended)
        run = train(*given).run
    assert steps_of(run) == TrainerConfig().max_steps
    done = train(*given, "resume=auto", f"hydra.run.dir={run}")
    assert done.code == 0, done.text
    steps = math.ceil(len(micro.parts().prepared.train) / 16)
    assert steps_of(run) == steps
    assert rows(run)[-1]["step"] == steps


@pytest.mark.parametrize(("checkpoint", "length"), [(True, TrainerConfig().max_steps), (False, 5)])
def test_a_run_that_is_started_again_keeps_the_length_that_it_was_given(train, checkpoint, length):
    run = train(LENGTH, "trainer.max_epochs=0.5").run
    if not checkpoint:
        shutil.rmtree(run / "checkpoints")
    assert steps_of(run) < length
    done = train(f"resume={run}", f"trainer.max_steps={length}", settings=False)
    assert done.code == 0, done.text
    again = train(f"resume={run}", settings=False)
    assert again.code == 0, again.text
    assert steps_of(run) == length


def test_the_same_command_with_an_experiment_keeps_the_length_in_passes(train, micro):
    """An experiment names every section, and the command knows of the steps no more than their default."""
    own = [setting for setting in micro.changed("experiment=soft_routing") if "max_steps" not in setting]
    given = (*own, "trainer.max_epochs=0.25", "trainer.precision=32-true")
    first = train(*given, settings=False)
    assert first.code == 0, first.text
    steps = steps_of(first.run)
    again = train(*given, "resume=auto", f"hydra.run.dir={first.run}", settings=False)
    assert again.code == 0, again.text
    assert steps_of(first.run) == steps < TrainerConfig().max_steps


def test_both_lengths_are_refused_and_a_phase_beyond_the_run_is_found_once_rows_are_read(micro):
    assert "trainer.max_epochs=1 and trainer.max_steps=7 are both set" in problems(
        micro, "trainer.max_steps=7", "trainer.max_epochs=1"
    )
    assert "trainer.max_epochs is 0.0, must be above 0" in problems(micro, LENGTH, "trainer.max_epochs=0")
    late = [LENGTH, "trainer.max_epochs=0.5", "phase.phases.experts.start=999"]
    assert problems(micro, *late) == ""
    with pytest.raises(ConfigError, match=r"step 999, but trainer\.max_steps=\d+ ends the run.*max_epochs=0\.5 of"):
        micro.parts(*late)


def test_a_stream_has_no_passes(micro):
    said = problems(micro, LENGTH, "trainer.max_epochs=1", "data.streaming=true")
    assert "how many rows a stream has is not known; give trainer.max_steps" in said
