"""Folders that are written in are removed: at once, or where their process was killed by a later one."""

import os
import time

import pytest

from lmoe.errors import BlendError
from lmoe.files.writing_folder import ABANDONED_AFTER, folder_when_whole, writing_folder


def test_a_folder_is_there_as_long_as_it_is_written_in(tmp_path):
    with writing_folder(tmp_path / "cache") as folder:
        assert os.listdir(tmp_path / "cache") == [os.path.basename(folder)]
    assert os.listdir(tmp_path / "cache") == []


def test_what_a_killed_process_left_is_removed_and_what_another_writes_stays(tmp_path):
    long_ago = time.time() - ABANDONED_AFTER - 60
    for name, of_folder, of_file in (("dead", long_ago, long_ago), ("slow", long_ago, None), ("new", None, None)):
        folder = tmp_path / f".writing-{name}"
        folder.mkdir()
        (folder / "input_ids").write_bytes(b"x" * 100)
        if of_file is not None:
            os.utime(folder / "input_ids", (of_file, of_file))
        if of_folder is not None:
            os.utime(folder, (of_folder, of_folder))
    (tmp_path / "rows-1.safetensors").write_bytes(b"x")
    os.utime(tmp_path / "rows-1.safetensors", (long_ago, long_ago))
    with writing_folder(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [".writing-new", ".writing-slow", "rows-1.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_has_its_name_when_it_is_whole_and_else_is_not_there(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / ".mine.writing-1").mkdir()

    def write() -> None:
        with folder_when_whole(tmp_path / "out", BlendError) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(BlendError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write()
    if isinstance(error, OSError):
        assert str(caught.value).endswith("out cannot be written: No space left on device; nothing is left of it")
    assert sorted(os.listdir(tmp_path)) == [".mine.writing-1", "out"] and not os.listdir(tmp_path / "out")
    with folder_when_whole(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
        assert not os.listdir(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["whole"] and len(os.listdir(tmp_path)) == 2
