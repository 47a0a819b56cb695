"""Seconds a step, from what short runs have left."""

from pathlib import Path

from lmoe.study.timing import time_arms
from tests.study.studies import config, study_of, write_summary

METRICS = "step,throughput/tokens,throughput/tokens_per_second\n" + "".join(f"{i},100,50\n" for i in range(1, 6))


def test_an_arm_whose_short_run_leaves_nothing_is_said_and_a_damaged_one_is_run_again(tmp_path):
    said, begun = [], []
    arms = study_of(config(space={}), tmp_path).arms

    def alone(settings, folder: Path) -> int:
        begun.append(folder.parent.name)
        write_summary(folder, 2.0)
        (folder / "metrics.csv").write_text(METRICS if folder.parent.name == "plain" else "step\n1\n")
        return 0

    def timed():
        return time_arms(
            arms,
            dict.fromkeys(arms, ()),
            tmp_path,
            steps=3,
            repeats=1,
            alone=alone,
            note=said.append,
            has_time=lambda: True,
        )

    found = timed()
    assert list(found) == ["plain"] and found["plain"].seconds == (2.0,) and found["plain"].tokens_per_step == 100
    assert begun == ["plain", "other"] and said[0].startswith("other: not timed, its short run has left no throughput")
    (tmp_path / "timing/plain/turn_0/report/summary.json").write_text("{")
    assert timed() == found and begun[2:] == ["plain", "other"]
