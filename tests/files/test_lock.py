"""A lock is held by one process, until it ends."""

import subprocess
import sys

import pytest

from lmoe.files.lock import taken_by_others

pytest.importorskip("fcntl")
HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def test_a_file_is_taken_as_long_as_the_process_lives_that_locked_it(tmp_path):
    place = tmp_path / "file"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with open(place, "a", encoding="utf-8") as file:
            assert taken_by_others(file)
    finally:
        holder.kill()
        holder.communicate()
    with open(place, "a", encoding="utf-8") as file:
        assert not taken_by_others(file)
