"""What runs were trained on and with: other weights of one base are refused, the rest is said."""

from pathlib import Path
from typing import Any

import pytest

from lmoe.config.backbone import BackboneConfig
from lmoe.errors import StudyError
from lmoe.run.provenance import add_provenance
from lmoe.study.conclude import conclude
from lmoe.study.jobs import Job, read_job
from lmoe.study.matched import ArmSize
from lmoe.study.origins import origin_notes, study_origins
from lmoe.study.progress import Progress
from lmoe.study.run import run_study
from tests.study.studies import Written, config, study_of

BASES = {"plain": BackboneConfig(), "other": BackboneConfig()}


def record(**changes: Any) -> dict[str, Any]:
    usual = {"lmoe": "1.0", "torch": "2.9"}
    found = {"data": {}, "backbone": {"name": "tiny", "fingerprint": "a" * 32}, "versions": usual, "platform": "Linux"}
    return found | changes


def on(base: str) -> dict[str, Any]:
    return record(backbone={"name": "tiny", "fingerprint": base * 32})


@pytest.fixture
def done(tmp_path) -> Progress:
    """A study of two arms that was tuned and judged, whose runs have recorded nothing yet."""
    return run_study(
        study_of(config(), tmp_path), Written(tmp_path, lambda job: 2.0 + (job.values[0][1] != 0.002)).tools
    )


def jobs(done: Progress, folder: Path) -> tuple[list[Job], list[Job]]:
    """Those that judge, and one that has tuned."""
    judged = [job for own in done.judged.values() for job in own]
    (place,) = folder.glob("runs/plain/optim.lr=0.001/seed_100")
    return judged, [read_job(place)]


def test_runs_of_one_origin_need_no_note(done, tmp_path):
    judged, tuned = jobs(done, tmp_path)
    assert study_origins(judged, tuned, BASES, tmp_path) == []
    for job in (*judged, *tuned):
        add_provenance(tmp_path / job.place, record())
    assert study_origins(judged, tuned, BASES, tmp_path) == []


def test_other_versions_and_platforms_are_said_also_of_a_run_that_went_on(done, tmp_path):
    judged, tuned = jobs(done, tmp_path)
    for job in judged:
        add_provenance(tmp_path / job.place, record())
    add_provenance(tmp_path / judged[0].place, record(versions={"lmoe": "1.1", "torch": "2.9"}))
    add_provenance(tmp_path / tuned[0].place, record(platform="macOS"))
    assert study_origins(judged, tuned, BASES, tmp_path) == [
        "trained with several versions of lmoe: 1.0, 1.1",
        "trained on several platforms: Linux, macOS",
    ]


def test_judged_runs_on_other_weights_of_one_base_are_refused_with_their_folders(done, tmp_path):
    judged, _ = jobs(done, tmp_path)
    for number, job in enumerate(judged):
        add_provenance(tmp_path / job.place, on("b" if number == 4 else "a"))
    with pytest.raises(StudyError, match="remove the folders of the jobs") as refused:
        study_origins(judged, [], BASES, tmp_path)
    assert f"; {tmp_path / judged[4].place} on {'b' * 32}" in str(refused.value)
    assert " and 2 more on " + "a" * 32 in str(refused.value)


def test_arms_of_different_bases_are_compared_with_a_note(done, tmp_path):
    judged, _ = jobs(done, tmp_path)
    for job in judged:
        add_provenance(tmp_path / job.place, on("b" if job.arm == "other" else "a"))
    notes = study_origins(judged, [], BASES | {"other": BackboneConfig(model_name="own")}, tmp_path)
    assert notes == ["the bases differ, and not their tokenizers: a difference may be that of the bases"]


def test_tuning_on_other_weights_is_said(done, tmp_path):
    judged, tuned = jobs(done, tmp_path)
    for job in judged:
        add_provenance(tmp_path / job.place, on("a"))
    add_provenance(tmp_path / tuned[0].place, on("b"))
    notes = study_origins(judged, tuned, BASES, tmp_path)
    said = f"tuned on a base with other weights than that of the judged runs: {tmp_path / tuned[0].place}"
    assert notes[-1] == said and len(notes) == 2


def test_a_result_has_the_notes_and_is_refused_where_bases_are_mixed(done, tmp_path, monkeypatch):
    size = ArmSize(total_parameters=10, active_parameters=5, flops_per_token=1e6, reading_share=0.0)
    monkeypatch.setattr("lmoe.study.conclude.arm_size", lambda config, runs: size)
    monkeypatch.setattr("lmoe.study.conclude.base_losses", lambda job, backbone, folder: {})
    monkeypatch.setattr("lmoe.study.conclude._curve", lambda runs: None)
    study, (judged, tuned) = study_of(config(), tmp_path), jobs(done, tmp_path)
    add_provenance(tmp_path / judged[0].place, on("a"))
    add_provenance(tmp_path / tuned[0].place, record(versions={"lmoe": "2.0"}))
    assert conclude(study, done).notes == ["trained with several versions of lmoe: 1.0, 2.0"]
    add_provenance(tmp_path / judged[1].place, on("b"))
    with pytest.raises(StudyError, match="bases with other weights"):
        conclude(study, done)


def test_a_record_that_does_not_say_its_version_is_no_other_version():
    assert origin_notes([record(), {"data": {}, "backbone": {"name": "tiny", "fingerprint": "a" * 32}}]) == []
