"""Seconds a step, from what short runs have left."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lmoe.files.run_folder import PROVENANCE_FILE
from lmoe.study.arms import Arm, Values
from lmoe.study.timing import Alone, ArmTiming, time_arms
from tests.study.studies import config, study_of, write_summary

METRICS = "step,throughput/tokens,throughput/tokens_per_second\n" + "".join(f"{i},100,50\n" for i in range(1, 6))


def timed_once(
    arms: Mapping[str, Arm],
    values: Mapping[str, Values],
    folder: Path,
    alone: Alone,
    note: Callable[[str], None],
) -> dict[str, ArmTiming]:
    """Times three steps of each arm in one turn."""
    return time_arms(arms, values, folder, steps=3, repeats=1, alone=alone, note=note, has_time=lambda: True)


def test_an_arm_whose_short_run_leaves_nothing_is_said_and_a_damaged_one_is_run_again(tmp_path):
    said, begun = [], []
    arms = study_of(config(space={}), tmp_path).arms

    def alone(settings, folder: Path) -> int:
        begun.append(folder.parent.name)
        write_summary(folder, 2.0)
        (folder / "metrics.csv").write_text(METRICS if folder.parent.name == "plain" else "step\n1\n")
        return 0

    def timed() -> dict[str, ArmTiming]:
        return timed_once(arms, dict.fromkeys(arms, ()), tmp_path, alone, said.append)

    found = timed()
    assert list(found) == ["plain"] and found["plain"].seconds == (2.0,) and found["plain"].tokens_per_step == 100
    assert begun == ["plain", "other"] and said[0].startswith("other: not timed, its short run has left no throughput")
    (tmp_path / "timing/plain/turn_0/report/summary.json").write_text("{")
    assert timed() == found and begun[2:] == ["plain", "other"]


def test_a_turn_that_was_timed_with_other_values_is_timed_anew(tmp_path):
    """A study that goes on may choose another rank, with which steps take another time."""
    arms = study_of(config(), tmp_path).arms
    begun: list[str] = []

    def alone(settings, folder: Path) -> int:
        begun.append(folder.parent.name)
        write_summary(folder, 2.0)
        (folder / "metrics.csv").write_text(METRICS)
        given = [text if not text.startswith("injection.lora_r") else f"++{text}" for text in settings]
        record = {"command": ["lmoe", "train", *given], "data": {}, "backbone": {}}
        (folder / PROVENANCE_FILE).write_text(json.dumps([record]))
        return 0

    def timed(rank: int) -> list[str]:
        values = {"plain": (("injection.lora_r", 8),), "other": (("injection.lora_r", rank),)}
        found = timed_once(arms, values, tmp_path, alone, begun.append)
        assert list(found) == ["plain", "other"]
        return begun

    assert timed(16) == ["plain", "other"] and timed(16) == ["plain", "other"]
    assert timed(32) == ["plain", "other", "other"] and timed(32) == ["plain", "other", "other"]
    (tmp_path / "timing/other/turn_0" / PROVENANCE_FILE).unlink()
    assert timed(64) == ["plain", "other", "other"], "a run that has no record is taken to have had them"
