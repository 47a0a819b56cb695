"""Row formats and malformed files."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmoe.data.sources import read_rows
from lmoe.errors import DataError
from lmoe.evaluate.questions import read_choices

PAIR = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
FORMATS = [
    ({"messages": list(PAIR)}, PAIR),
    ({"prompt": "q", "response": "a"}, PAIR),
    ({"prompt": "q", "completion": "a"}, PAIR),
    ({"instruction": "q", "output": "a"}, PAIR),
    ({"instruction": "q", "input": "", "output": "a"}, PAIR),
    ({"instruction": "q", "input": "x", "output": "a"}, ({"role": "user", "content": "q\n\nx"}, PAIR[1])),
    ({"text": "t"}, None),
]


@pytest.mark.parametrize(("record", "messages"), FORMATS)
def test_every_format_becomes_one_shape(write_rows: Any, record: dict[str, Any], messages: Any) -> None:
    [row] = read_rows(write_rows(record))
    assert row.messages == messages and row.text == record.get("text") and row.domain == "all"


def test_domains_come_from_rows_then_file_names(write_rows: Any, tmp_path: Path) -> None:
    write_rows({"text": "x"}, {"text": "y", "domain": "code"}, name="data/math.jsonl")
    (tmp_path / "data" / "sql.jsonl.gz").write_bytes(gzip.compress(b'{"text": "z"}\n'))
    assert [row.domain for row in read_rows(str(tmp_path / "data"))] == ["math", "code", "sql"]


MALFORMED = [
    (b'{"text": "x"}\n{"text": \n', r"rows\.jsonl:2: malformed JSON"),
    (b'{"text": "x"}\n\n[1]\n', r"rows\.jsonl:3: a row must be a JSON object, got list"),
    (b'{"text": "x"}\n{"text": "\xff"}\n', r"rows\.jsonl:2: not UTF-8"),
    (b'{"text": "\\ud800"}\n', r"rows\.jsonl:1: half of a surrogate pair"),
    (b'{"question": "x"}\n', r"rows\.jsonl:1: unknown row format with keys \['question'\]"),
    (b'{"messages": []}\n', r"rows\.jsonl:1: messages must be a non-empty list"),
    (b'{"messages": [{"role": "bot", "content": "x"}]}\n', r"rows\.jsonl:1: messages\[0\]\.role is 'bot'"),
    (b'{"prompt": 1, "response": "x"}\n', r"rows\.jsonl:1: prompt must be text, got 1"),
    (b'{"text": "x", "domain": "a/b"}\n', r"rows\.jsonl:1: domain must be text without a slash"),
    (b"\n", r"rows\.jsonl: no rows"),
    (b'{"text": "x"}\n{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", r"rows\.jsonl:2: lists and objects are nested"),
    (
        b'{"text": "x", "n": ' + b"[" * 200_000 + b"\n",
        r"rows\.jsonl:1: lists and objects are nested more than 100",
    ),
    (b'\n{"text": "x", "n": ' + b"9" * 4301 + b"}\n", r"rows\.jsonl:2: a whole number of more than 4,300 digits"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED)
def test_malformed_rows_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / "rows.jsonl"))


LONG = "a" * 5000


@pytest.mark.parametrize(
    "record",
    [
        {LONG: 1},
        {"text": "x", "domain": LONG},
        {"messages": LONG},
        {"messages": [{"role": LONG, "content": "x"}]},
        {"messages": [{"role": "user", LONG: "x"}]},
        {"question": "x", LONG: 1},
        {"question": "x", "choices": [LONG], "answer": 0},
        {"question": [LONG], "choices": ["a", "b"], "answer": 0},
        {"question": "x", "choices": ["a", "b"], "answer": LONG},
    ],
)
def test_a_message_about_a_row_never_shows_a_long_value_whole(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    read = read_choices if "question" in record else lambda path, _: read_rows(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*aaa.*") as refused:
        read(str(tmp_path / "rows.jsonl"), tmp_path)
    assert len(str(refused.value)) < 1000


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n')
    assert [row.text for row in read_rows(str(tmp_path / "rows.jsonl"))] == ["x"]


def test_damaged_gzip_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "x"}\n' * 500)
    for name, content in {"a": whole[:-12], "b": whole[:15] + b"\xff" * 20 + whole[35:], "c": b"no gzip"}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz: cannot be read"):
            read_rows(str(tmp_path / f"{name}.jsonl.gz"))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_rows(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file of rows in this folder \(\.jsonl, .*each also \.gz or \.zst"):
        read_rows(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Couldn't reach the hub"), FileNotFoundError("no"), ValueError("bad name"), RuntimeError()],
)
def test_a_hub_name_that_cannot_be_loaded_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(name: str, config: str | None, split: str, revision: str | None) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"data\.path=who/what: neither a local path nor a data set.*save_to_disk"):
        read_rows("who/what")


def test_a_hub_data_set_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config, split, revision: [{"prompt": "q", "response": "a"}]
    )
    [row] = read_rows("who/what")
    assert (row.messages, row.where) == (PAIR, "who/what[0]")


def test_a_field_that_nobody_reads_may_be_no_number_or_a_long_one(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "x", "score": NaN, "id": ' + b"9" * 4300 + b"}\n")
    assert [row.text for row in read_rows(str(tmp_path / "rows.jsonl"))] == ["x"]


def test_a_file_without_lines_is_refused_at_its_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lmoe.data.files.LONGEST_LINE", 100)
    for name, opened in (("rows.jsonl", open), ("rows.jsonl.gz", gzip.open)):
        with opened(tmp_path / name, "wb") as file:
            file.write(b'{"text": "x"}\n[' + b'{"text": "x"}, ' * 20 + b"]")
        with pytest.raises(DataError, match=f"{name}:2: a line of more than 100 bytes; a file has one row"):
            read_rows(str(tmp_path / name))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl: is no ordinary file"):
        read_rows(str(tmp_path / "rows.jsonl"))
