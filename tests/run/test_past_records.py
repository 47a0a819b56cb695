"""What a run has kept beside its checkpoints: a damaged file is named before anything is loaded or touched."""

import os
from pathlib import Path

import pytest

from lmoe.errors import CheckpointError, TrainingError
from lmoe.run.claim import LOCK_FILE, claimed
from lmoe.run.past_records import check_records

DAMAGED = [
    ("run_id", b"\xff\xfe", "not UTF-8"),
    ("run_id", b"a\nb\n", "must hold one line"),
    ("wandb/run_id", b"\xff", "remove it to go on as a new run of W&B"),
    ("metrics.csv", b"step,a\n1,\xff\n", "move it away, and the run goes on with a new one"),
    ("metrics.csv", b"step,a\n1," + b"1" * 200_000 + b"\n", "field larger than field limit"),
    ("provenance.json", b"[" * 3000, "nested more than 100 deep"),
    ("provenance.json", b"{}", "must hold a list, holds dict"),
    ("provenance.json", b"[1]", "holds what is no record of a start"),
    ("provenance.json", b'[{"data": [], "backbone": {}}]', "holds what is no record of a start"),
    ("provenance.json", b"[{]", "remove it to go on without comparing data and backbone"),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED)
def test_a_damaged_record_is_named_with_what_to_do(tmp_path, name, content, said):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        check_records(tmp_path)
    assert f"{tmp_path / name}: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("name", ["run_id", "metrics.csv", "provenance.json"])
def test_a_run_with_a_damaged_record_is_refused_before_its_model_is_loaded(train, own_run, monkeypatch, name):
    monkeypatch.setattr("lmoe.run.train.build_parts", lambda *_, **__: pytest.fail("the model was loaded"))
    (own_run / name).write_bytes(b"\xff\xfe")
    before = {file: file.read_bytes() for file in own_run.rglob("*") if file.is_file() and file.name != LOCK_FILE}
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert f"{own_run / name}: cannot be read: not UTF-8" in done.text
    assert {f: f.read_bytes() for f in own_run.rglob("*") if f.is_file() and f.name != LOCK_FILE} == before


def test_nothing_kept_is_nothing_damaged(tmp_path, own_run):
    check_records(tmp_path)
    check_records(own_run)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[" * 3000, b"\xff\xfe", b'{"pid": {}, "host": 1, "since": 2}', b"9" * 5000]
)
def test_a_lock_that_is_held_is_said_whatever_its_file_holds(tmp_path, content):
    with claimed(tmp_path):
        pid = os.fork()
        if not pid:  # a lock holds against other processes, and goes when its own one opens and closes the file
            code = 1
            try:
                (tmp_path / LOCK_FILE).write_bytes(content)
                with claimed(tmp_path):
                    code = 2
            except TrainingError as error:
                code = 0 if str(error).startswith(f"{tmp_path} is in use; wait for it") else 3
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", [LOCK_FILE, "config.yaml.partial", "checkpoints/last.partial", "report/index.html"])
def test_a_run_that_would_write_through_a_link_is_refused(train, own_run, tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    place = own_run / name
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "mine")
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert f"{place} is a link to {tmp_path / 'mine'}, outside this folder; remove it" in done.text
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_pipe_in_a_run_is_not_waited_for(train, own_run):
    os.mkfifo(own_run / "metrics.partial")
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert "metrics.partial is no ordinary file; remove it" in done.text


def test_a_folder_elsewhere_may_hold_the_checkpoints(train, own_run, tmp_path):
    (own_run / "checkpoints").rename(tmp_path / "large disk")
    Path(own_run / "checkpoints").symlink_to(tmp_path / "large disk")
    assert train(f"resume={own_run}", settings=False).code == 0
