"""Small files of strangers: what is no such file is refused by its name, before it costs anything."""

import os
from pathlib import Path

import pytest

from lmoe.errors import CheckpointError, DataError
from lmoe.files.small_file import LEVELS, Reader, is_deeper, leading_out, make_way, read_json

READER = Reader(cure="put it back")
ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


def refused(read, path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    for word in (f"{path}: ", *words, "; put it back"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "malformed JSON"),
        (b'{"a": 1,\n}', "at line 2, column 1"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
        (b"[" * 200_000, f"nested more than {LEVELS} deep"),
        (b'{"a": ' + b"[" * LEVELS + b"]" * LEVELS + b"}", f"nested more than {LEVELS} deep"),
        (b'{"a": ' + b"9" * 4301 + b"}", "a whole number of more than 4,300 digits"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": 1e999}', "1e999 is too large for a number"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[]", "must hold an object, holds list"),
        (b"null", "must hold an object, holds NoneType"),
        (b" " * 4_000_001, "4,000,001 bytes; a config has at most 4,000,000"),
    ],
)
def test_what_is_no_json_object_is_refused_by_file_and_reason(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    refused(READER.json, tmp_path / "a.json", said)


def test_json_as_deep_as_allowed_and_with_a_byte_order_mark_is_read(tmp_path):
    levels = LEVELS - 1
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": ' + b"[" * levels + b"]" * levels + b"}")
    assert not is_deeper(read_json(tmp_path / "a.json"), LEVELS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "cannot be read"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("- 1\n", "must hold a mapping"),
        ("text", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: " + "[" * 5000 + "]" * 5000, f"nested more than {LEVELS} deep"),
        (ALIASES, "*a refers to another value"),
        ("a: " + "9" * 4301, "4300 digits"),
        ("a: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("name: ${oc.env:HOME}", "name is '${oc.env:HOME}', an interpolation"),
        ("a: {b: [1, 'x ${c} y']}", "a.b[1] is 'x ${c} y', an interpolation"),
        ("a: '${bad'", "'${bad'"),
        ("${a}: 1", "a key is '${a}', an interpolation"),
    ],
)
def test_what_is_no_plain_yaml_mapping_is_refused_by_file_and_reason(tmp_path, content, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(content, encoding="utf-8")
    refused(READER.yaml, tmp_path / "a.yaml", said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("read", [READER.json, READER.yaml, READER.text, READER.word], ids=lambda read: read.__name__)
@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "bytes"])
def test_a_pipe_a_folder_nothing_and_bytes_are_refused_without_waiting(tmp_path, read, kind):
    path = tmp_path / "file"
    made = {"pipe": os.mkfifo, "folder": Path.mkdir, "bytes": lambda p: p.write_bytes(b"\xff\xfe"), "missing": str}
    made[kind](path)
    refused(read, path, {"missing": "no such file", "bytes": "not UTF-8"}.get(kind, "is no ordinary file"))


def test_the_error_is_of_the_type_that_the_reader_names(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Reader(error=DataError).text(tmp_path / "none")


def test_a_word_has_one_line(tmp_path):
    (tmp_path / "id").write_text(" abc\n")
    assert READER.word(tmp_path / "id") == "abc"
    for content in ("a\nb", "a" * 129, "a\x1b[31m"):
        (tmp_path / "id").write_text(content)
        refused(READER.word, tmp_path / "id", "one line of at most 128 characters")


def test_links_to_files_outside_and_pipes_lead_out_and_links_to_folders_may_stay(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "wandb").mkdir()
    (tmp_path / "outside").write_text("mine")
    (run / "checkpoints").symlink_to(tmp_path)
    (run / "own").symlink_to("adapter/a")
    (run / "wandb" / "debug.log").symlink_to(tmp_path / "outside")
    assert leading_out(run) is None
    (run / "adapter" / "run.lock").symlink_to(tmp_path / "outside")
    assert leading_out(run) == (
        f"{run}/adapter/run.lock is a link to {tmp_path}/outside, outside this folder; remove it"
    )
    (run / "adapter" / "run.lock").unlink()
    os.mkfifo(run / "pipe")
    assert leading_out(run) == f"{run}/pipe is no ordinary file; remove it"


def test_a_link_that_leads_to_itself_is_named(tmp_path):
    (tmp_path / "run.lock").symlink_to("run.lock")
    assert leading_out(tmp_path) == f"{tmp_path}/run.lock is a link that leads to itself; remove it"


def test_what_is_written_over_a_link_does_not_land_where_it_leads(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    make_way(tmp_path / "link")
    (tmp_path / "link").write_text("theirs")
    assert (tmp_path / "mine").read_text() == "mine"
