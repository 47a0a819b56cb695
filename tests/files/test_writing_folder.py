"""Folders that are written in are removed: at once, or where their process was killed by a later one."""

import os
import time

from lmoe.files.writing_folder import ABANDONED_AFTER, writing_folder


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
