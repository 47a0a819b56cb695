"""A study that goes on is the one that was begun, or the message says in what it differs."""

import json
from dataclasses import replace

import pytest

from lmoe.config.logger import LoggerConfig
from lmoe.config.optim import OptimConfig
from lmoe.config.phase import PhaseConfig, PhaseScheduleConfig
from lmoe.config.run import RunConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import StudyError
from lmoe.study.study import CONFIG_FILE, keep_config
from tests.study.studies import config, study_of

FILES = {"a.jsonl": "1" * 64, "b.jsonl": "2" * 64}


def begun(folder, *given: str):
    """Begin a study with settings, and return how to begin it again with others."""

    def begin(*settings: str, files=FILES, runs=None, **changes):
        study = replace(study_of(config(**changes), folder), given=settings)
        keep_config(replace(study, configs=dict(study.configs) | (runs or {})), files)

    begin(*given)
    return begin


def test_settings_in_another_order_are_the_same(tmp_path):
    again = begun(tmp_path, "optim.lr=1", "moe=soft")
    again("moe=soft", "optim.lr=2", "optim.lr=1")


def test_of_settings_the_message_names_those_that_differ(tmp_path):
    again = begun(tmp_path, *(f"moe.key_{number}=1" for number in range(20)), "optim.lr=1")
    with pytest.raises(StudyError) as told:
        again(*(f"moe.key_{number}=1" for number in range(20)), "optim.lr=3", "optim.eps=2")
    said = str(told.value)
    assert "optim.lr is 3, was 1" in said and "optim.eps is 2, was not set" in said and "key_" not in said


def test_of_long_lists_the_message_names_the_items_that_differ(tmp_path):
    seeds = list(range(100, 140))
    again = begun(tmp_path)
    study = {"common": [f"data.key_{seed}=1" for seed in seeds]}
    with pytest.raises(StudyError, match="study.common"):
        again(**study)
    (tmp_path / CONFIG_FILE).unlink()
    again(**study)
    with pytest.raises(StudyError) as told:
        again(common=[*study["common"][:-1], "data.other=1"])
    said = str(told.value)
    assert "study.common has data.other=1, which it had not" in said
    assert "study.common had data.key_139=1, which it has not" in said and "key_138" not in said


def test_of_long_texts_the_message_shows_where_they_differ(tmp_path):
    again = begun(tmp_path)
    long = f"data.path={'deep/' * 20}"
    (tmp_path / CONFIG_FILE).unlink()
    again(f"{long}one.jsonl", common=[f"{long}one"])
    with pytest.raises(StudyError) as told:
        again(f"{long}two.jsonl", common=[f"{long}two"])
    said = str(told.value)
    assert "data.path is …deep/deep/two.jsonl, was …deep/deep/one.jsonl" in said
    assert "study.common has data.path=deep/" in said and "deep/two, which it had not" in said


def test_the_words_of_a_study_may_change(tmp_path):
    again = begun(tmp_path)
    arms = {name: replace(arm, title=f"the {name}") for name, arm in config().arms.items()}
    again(question="Which one?", arms=arms)
    with pytest.raises(StudyError, match=r"study\.arms\.other\.seed_offset is 7, was 0"):
        again(arms=arms | {"other": replace(arms["other"], seed_offset=7)})


def test_of_rows_the_message_names_the_file(tmp_path):
    again = begun(tmp_path)
    again(files={"elsewhere/a.jsonl": "1" * 64, "b.jsonl": "2" * 64})
    with pytest.raises(StudyError, match=r"b\.jsonl holds rows that the study was not begun with") as told:
        again(files={"a.jsonl": "1" * 64, "b.jsonl": "3" * 64})
    assert "a.jsonl" not in str(told.value)
    with pytest.raises(StudyError, match=r"b\.jsonl is no longer among its files"):
        again(files={"a.jsonl": "1" * 64})


def test_a_study_of_an_earlier_version_goes_on_with_the_same_rows_alone(tmp_path):
    again = begun(tmp_path)
    kept = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(kept | {"data": sorted(FILES.values())}))
    again()
    with pytest.raises(StudyError, match=r"b\.jsonl holds rows"):
        again(files={"a.jsonl": "1" * 64, "b.jsonl": "3" * 64})
    with pytest.raises(StudyError, match="1 files of rows that the study was begun with are not among them"):
        again(files={"a.jsonl": "1" * 64})


def test_a_damaged_record_is_refused_with_its_cure(tmp_path):
    again = begun(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"format_version": 1, "study": {}, "settings": 3}))
    with pytest.raises(StudyError, match="holds something else"):
        again()


RUN = RunConfig(trainer=TrainerConfig(max_steps=10), optim=OptimConfig(lr=0.1))


def test_runs_that_files_of_choices_make_other_ones_are_refused_with_their_keys(tmp_path):
    """The settings are alike: what a name such as experiment=mine stands for has changed."""
    again = begun(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    again(runs={"other": RUN})
    again(runs={"other": RUN})
    with pytest.raises(StudyError, match=r"optim\.lr is 0\.5, was 0\.1 in the runs of other, though it is set alike"):
        again(runs={"other": replace(RUN, optim=OptimConfig(lr=0.5))})
    phased = replace(RUN, phase=PhaseScheduleConfig(phases={"late": PhaseConfig()}))
    with pytest.raises(StudyError, match=r"phase\.phases\.late is .*, was not set in the runs of other"):
        again(runs={"other": phased})
    with pytest.raises(StudyError) as told:
        again("optim.lr=0.5", runs={"other": replace(RUN, optim=OptimConfig(lr=0.5))})
    assert "optim.lr is 0.5, was not set" in str(told.value) and "choices" not in str(told.value), "said once"


def test_runs_may_change_in_what_no_weight_depends_on(tmp_path):
    again = begun(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    again(runs={"other": RUN})
    moved = replace(RUN, name="x", logger=LoggerConfig(project="x"), data=replace(RUN.data, path="elsewhere"))
    again(runs={"other": replace(moved, trainer=replace(RUN.trainer, log_every_n_steps=7))})


def test_a_study_of_an_earlier_version_goes_on_with_keys_that_runs_did_not_have_then(tmp_path):
    again = begun(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    again(runs={"other": RUN})
    kept = json.loads((tmp_path / CONFIG_FILE).read_text())
    del kept["runs"]["other"]["optim"]["lr"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(kept))
    again(runs={"other": replace(RUN, optim=OptimConfig(lr=0.5))})
    del kept["runs"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(kept))
    again(runs={"other": replace(RUN, trainer=TrainerConfig(max_steps=20))})
