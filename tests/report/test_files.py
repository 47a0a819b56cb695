"""Files of a report are written whole or not at all."""

import os
from pathlib import Path

import pytest

from lmoe.errors import TrainingError
from lmoe.report.files import write_bytes


def test_a_file_is_written_with_its_folder_and_replaces_an_older_one(tmp_path: Path) -> None:
    place = tmp_path / "new" / "file"
    assert write_bytes(place, b"one") == place
    assert write_bytes(place, b"two").read_bytes() == b"two"
    assert [file.name for file in place.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_what_cannot_be_written_whole_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    place = write_bytes(tmp_path / "file", b"old")

    def torn(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    def refused(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    if step == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", torn)
    else:
        monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(TrainingError, match=r"file cannot be written: No space left on device"):
        write_bytes(place, b"new")
    assert place.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "file").symlink_to(other)
    write_bytes(tmp_path / "file", b"new")
    assert other.read_text() == "mine" and not (tmp_path / "file").is_symlink()
