"""trainer.max_epochs: the length of a run in passes over its rows."""

import math

import pytest
import yaml

from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError
from lmoe.rules.validate import run_problems

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
