"""Files of every kind and compression, whole, in pieces, and damaged."""

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from lmoe.data.rows.files import Piece, folder_of, kind_of, pieces, place_of, stem
from lmoe.data.rows.row import Row
from lmoe.data.rows.sources import Source, open_source, read_rows
from lmoe.errors import DataError, LmoeError

RECORDS = [{"prompt": f'What is {n}?\nSay, "it".', "response": f"é {n}, 漢"} for n in range(5)]


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "response"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


def as_arrow(new: Callable[..., Any]) -> bytes:
    table, sink = pyarrow.Table.from_pylist(RECORDS), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue()


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
FILES = {
    "jsonl": LINES,
    "ndjson": LINES,
    "json": json.dumps(RECORDS, indent=1).encode(),
    "lines.json": LINES,
    "csv": as_csv(","),
    "tsv": as_csv("\t"),
    "parquet": as_parquet(RECORDS),
    "file.arrow": as_arrow(pyarrow.ipc.new_file),
    "stream.arrow": as_arrow(pyarrow.ipc.new_stream),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def rows_of(path: Path) -> list[Row]:
    return read_rows(str(path), path.parent / ".cache")


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        rows_of(path)
    return str(error.value)


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_rows_packed_or_not(tmp_path: Path, name: str, packed: str) -> None:
    file = written(tmp_path / f"rows.{name}{packed}", PACKED[packed](FILES[name]))
    found = rows_of(file)
    expected = [(record["prompt"], record["response"]) for record in RECORDS]
    assert [tuple(message["content"] for message in row.messages or ()) for row in found] == expected
    assert [path.name for path in (tmp_path / ".cache" / "tables").glob(".writing-*")] == []


@pytest.mark.parametrize("packed", PACKED)
def test_a_text_file_has_a_row_a_line(tmp_path: Path, packed: str) -> None:
    file = written(tmp_path / f"a.txt{packed}", PACKED[packed](b"\xef\xbb\xbfone\r\n\n  two\t\nthree"))
    assert [(row.text, row.where) for row in rows_of(file)] == [
        *(("one", f"{file}:1"), ("  two\t", f"{file}:3"), ("three", f"{file}:4"))
    ]


def test_where_a_row_is_from_is_its_line_or_its_number(tmp_path: Path) -> None:
    where = {name: rows_of(written(tmp_path / f"a.{name}", FILES[name]))[1].where for name in FILES}
    assert {where[name].removeprefix(str(tmp_path)) for name in ("jsonl", "lines.json")} == {
        *("/a.jsonl:2", "/a.lines.json:2")
    }
    assert where["csv"].endswith("a.csv:4")  # each row has two lines, below the header
    assert (where["json"][-9:], where["parquet"][-12:]) == ("a.json[1]", "a.parquet[1]")


@pytest.mark.parametrize("name", FILES)
def test_a_record_is_found_again_by_its_number(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / f"a.{name}", FILES[name])
    opened = open_source(Source(key="data.path", path=str(file)), tmp_path / ".cache")
    found = [
        (place_of(opened.places[part.place], number), where)
        for part in opened.parts
        for _, where, number in part.records
    ]
    assert len(found) == len(RECORDS)
    assert all(again == where for again, where in found)


MALFORMED = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', ":2: malformed JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n[1]\n', ":3: a row must be a JSON object, got list; a list of rows is a .json file"),
    (
        "a.xlsx",
        b"PK\xff",
        ":1: not UTF-8; convert the file, for example with iconv -f latin1 -t utf8 (read as lines of JSON, because its",
    ),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ":2: not UTF-8; convert the file, for example with iconv"),
    ("a.json", b'[{"text": "\xe9"}]', ": not UTF-8; convert the file, for example with iconv"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', ":1: half of a surrogate pair"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", ":2: lists and objects are nested"),
    ("a.jsonl", b'{"text": "x", "n": ' + b"[" * 200_000 + b"\n", ":1: lists and objects are nested more than 100"),
    ("a.jsonl", b'\n{"text": "x", "n": ' + b"9" * 4301 + b"}\n", ":2: a whole number of more than 4,300 digits"),
    ("a.json", b'[{"text": "x"}, 3]', "[1]: a row must be a JSON object, got int"),
    ("a.json", b'[\n{"text": "x"},\n]', ": malformed JSON: "),
    ("a.json", b'{\n"data": [{"text": "x"}]\n}', ": begins with an object over several lines"),
    ("a.json", b'{"data": [{"text": "x"}]}', ":1: unknown row format with keys ['data']"),
    ("a.csv", b"text,b\nx\n", ":2: 1 cells, and the header has 2"),
    ("a.csv", b"text,b\nx,y,z\n", ":2: 3 cells, and the header has 2"),
    ("a.csv", b'text,b\n"x\ny",1\nx,y,z\n', ":4: 3 cells, and the header has 2"),
    ("a.csv", b"text,text\nx,y\n", ":1: two columns are called 'text'"),
    ("a.csv", b"prompt;response\nx;y\n", ":1: one column, called 'prompt;response'; cells are parted by commas here"),
    ("a.tsv", b"prompt;response\nx;y\n", ":1: one column, called 'prompt;response'; cells are parted by tabs here"),
    ("a.csv", b"text\n" + b"x\n" * 5000 + b"\xe9t\xe9\n", ":5002: not UTF-8; convert the file"),
    ("a.csv", b"\xe9,text\nx,y\n", ":1: not UTF-8; convert the file"),
    ("a.csv", b'text\nx\n"y\nz\n', ":3: malformed CSV: unexpected end of data"),
    ("a.csv", b'text\n"x"y\n', ":2: malformed CSV: ',' expected after '\"'"),
    ("a.csv", b"what\nx\n", ":2: unknown row format with keys ['what']"),
    ("a.txt", b"x\n\xff\n", ":2: not UTF-8; convert the file"),
    ("a.parquet", as_parquet([{"q": "x", "level": 3}]), "[0]: unknown row format with keys ['level', 'q']"),
    ("a.parquet", as_parquet([{"text": 3}]), "[0]: text must be text, got 3"),
    ("a.parquet", as_parquet([{"text": ["x"]}]), "[0]: text must be text, got ['x']"),
    ("a.parquet", as_parquet([{"text": b"\xff"}]), "[0]: text must be text, got b'\\xff'"),
    (
        "a.parquet",
        as_parquet([{"text": "caf\xe9 caf\xe9"}]).replace("\xe9".encode(), b"\xe9\xe9"),
        ": cannot be read: ",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_malformed_rows_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = written(tmp_path / name, content)
    assert refused(file).startswith(f"{file}{message}")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv.gz", "a.txt", "a.rows"])
def test_a_file_of_utf16_is_refused_whole_with_what_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    monkeypatch.setattr("lmoe.data.rows.files.SHARD_BYTES", 10)
    content = "\ufeff".encode(encoding) + LINES.decode().encode(encoding)
    file = written(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    said = f"{file}: UTF-16, not UTF-8; convert the file, for example with iconv -f utf-16 -t utf8"
    for part in open_source(Source(key="data.path", path=str(file)), tmp_path / "cache").parts:
        with pytest.raises(DataError) as error:
            list(part.rows())
        assert str(error.value) == said


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "txt", "parquet", "file.arrow"])
def test_a_torn_packed_file_is_one_clear_error(tmp_path: Path, name: str, packed: str) -> None:
    whole = PACKED[packed](FILES.get(name, LINES))
    for content in (whole[:-7], whole[:12], b"neither", whole[:15] + b"\xff" * 20 + whole[35:]):
        file = written(tmp_path / f"a.{name}{packed}", content)
        assert refused(file).startswith(f"{file}")
        assert not refused(file).endswith("no rows")
    assert not list((tmp_path / ".cache").rglob(".writing-*"))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_packed_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path, packed: str) -> None:
    lines = "".join(json.dumps({"text": f"{number} {number**50}"}) + "\n" for number in range(300)).encode()
    whole = PACKED[packed](lines) + PACKED[packed](lines)
    for end in (len(whole) - 1, len(whole) * 3 // 4, len(whole) // 2 + 20, len(whole) // 3):
        file = written(tmp_path / f"a.jsonl{packed}", whole[:end])
        assert "cannot be read: " in refused(file), end
    file = written(tmp_path / f"a.jsonl{packed}", whole)
    assert len(rows_of(file)) == 600


def test_frames_of_zst_that_hold_no_rows_are_passed_over(tmp_path: Path) -> None:
    aside = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    packed = PACKED[".zst"](b'{"text": "x"}\n')
    file = written(tmp_path / "a.jsonl.zst", aside + packed + aside + packed + PACKED[".zst"](b"") + aside)
    assert [row.text for row in rows_of(file)] == ["x", "x"]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"prompt": "a", "prompt": "b", "response": "c"}', "prompt"),
        ('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "role"),
        ('{"text": "x", "about": {"id": 1, "id": 1}}', "id"),
        (r'{"text": "x", "t\u0065xt": "y"}', "text"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_comes_twice_is_refused_since_one_value_would_be_lost(
    tmp_path: Path, line: str, key: str, name: str
) -> None:
    content = f"[{line}]" if name == "a.json" else f'{{"text": "x"}}\n{line}'
    file = written(tmp_path / name, content.encode())
    where = file if name == "a.json" else f"{file}:2"
    assert refused(file) == f"{where}: the key {key!r} comes twice in one object; leave one of them out"


@pytest.mark.parametrize("name", ["parquet", "file.arrow", "stream.arrow"])
def test_a_torn_table_is_one_clear_error(tmp_path: Path, name: str) -> None:
    for content in (FILES[name][:-9], FILES[name][:50], b"neither", b""):
        file = written(tmp_path / f"a.{name}", content)
        assert refused(file).startswith(f"{file}: cannot be read: ")
    assert not list((tmp_path / ".cache").rglob("*.arrow"))


@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    file = written(tmp_path / f"a.{name}", content)
    assert refused(file) == f"{file}: no rows"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[]"),
        ("a.csv", b"text\n"),
        ("a.parquet", as_parquet(RECORDS[:0])),
        ("a.jsonl.gz", gzip.compress(b"")),
    ],
    ids=["list", "header", "table", "archive"],
)
def test_a_file_that_holds_nothing_has_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    file = written(tmp_path / name, content)
    assert refused(file) == f"{file}: no rows"


def test_null_fields_of_a_table_are_as_if_they_were_absent(tmp_path: Path) -> None:
    calls = [
        {"function": {"name": "f", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "g", "arguments": {"n": 1}}},
    ]
    conversations: list[Any] = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "Ann", "weight": 0}],
    ]
    records = [{"messages": conversations[0], "text": None}, {"messages": conversations[1], "text": None}]
    file = written(tmp_path / "a.parquet", as_parquet([*records, {"messages": None, "text": "t"}]))
    calling, muted, text = rows_of(file)
    assert calling.messages is not None and muted.messages is not None
    assert [call["function"]["arguments"] for call in calling.messages[1]["tool_calls"]] == [{"city": "Oslo"}, {"n": 1}]
    assert muted.messages[1] == {"role": "assistant", "content": "a", "name": "Ann"} and muted.muted == {1}
    assert text.text == "t" and all(row.ignored == () for row in (calling, muted, text))


def test_categories_of_a_table_are_what_they_stand_for(tmp_path: Path) -> None:
    column = pyarrow.array(["math", "code", "math"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "domain": column}), tmp_path / "a.parquet")
    assert [row.domain for row in rows_of(tmp_path / "a.parquet")] == ["math", "code", "math"]


def test_a_table_with_other_bytes_is_read_anew_whatever_its_time_and_size(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", as_parquet([{"text": "one"}]))
    assert [row.text for row in rows_of(file)] == ["one"]
    time = file.stat().st_mtime_ns
    written(file, as_parquet([{"text": "two"}]))
    os.utime(file, ns=(time, time))
    assert [row.text for row in rows_of(file)] == ["two"]


def test_a_table_is_named_as_it_is_and_not_as_a_pattern(tmp_path: Path) -> None:
    written(tmp_path / "a1.parquet", as_parquet([{"text": "other"}]))
    assert [row.text for row in rows_of(written(tmp_path / "a[1].parquet", as_parquet([{"text": "x"}])))] == ["x"]


def test_a_cache_that_tables_cannot_be_unpacked_to_is_named(tmp_path: Path) -> None:
    written(tmp_path / "taken", b"")
    file = written(tmp_path / "a.parquet", FILES["parquet"])
    with pytest.raises(DataError, match=r"data\.cache_dir: .*taken/cache/tables cannot be written"):
        read_rows(str(file), tmp_path / "taken" / "cache")


def test_mixed_types_of_a_field_that_nobody_reads_are_no_error(tmp_path: Path) -> None:
    content = b'{"text": "x", "score": NaN, "id": ' + b"9" * 4300 + b'}\n{"text": "y", "score": "high", "id": [1]}\n'
    found = rows_of(written(tmp_path / "a.jsonl", content))
    assert [(row.text, row.ignored) for row in found] == [("x", ("id", "score")), ("y", ("id", "score"))]


def test_a_cell_may_be_huge_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", b"\r\ntext,n\r\n\r\n" + b"x" * 200_000 + b",1\r\n\r\n")
    [row] = rows_of(file)
    assert row.text == "x" * 200_000 and row.where == f"{file}:4"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_line_that_is_longer_than_any_row_ends_the_reading_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packed: str
) -> None:
    monkeypatch.setattr("lmoe.data.rows.files.LONGEST_LINE", 100)
    monkeypatch.setattr("lmoe.data.rows.files.SHARD_BYTES", 30)
    head = {"rows.csv": b"text\n", "rows.txt": b"x\n"}.get(name, b'{"text": "x"}\n')
    file = written(tmp_path / f"{name}{packed}", PACKED[packed](head + b"x" * 300 + b"\n" + head))
    assert refused(file).startswith(f"{file}:2: a line of more than 100 ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        os.mkfifo(tmp_path / name)
        assert refused(tmp_path / name) == f"{tmp_path / name}: is no ordinary file"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 20, 64, 10_000])
@pytest.mark.parametrize("last", [b"", b"{"])
def test_a_file_in_pieces_has_the_same_records_lines_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, end: bytes, last: bytes
) -> None:
    lines = [b'{"text": "%d %s"}' % (n, b"x" * (n * 7 % 40)) for n in range(12)]
    lines[4], lines[5], lines[7] = b"", b"  ", b"not JSON"
    content = b"\xef\xbb\xbf" + end.join(lines) + (end + last if last else b"")
    file = written(tmp_path / "a.jsonl", content)
    whole = [(str(record), where, number) for record, where, number in Piece(file)]
    monkeypatch.setattr("lmoe.data.rows.files.SHARD_BYTES", size)
    found, digest = pieces(file)
    assert [(str(record), where, number) for piece in found for record, where, number in piece] == whole
    assert digest == hashlib.sha256(content).hexdigest()
    assert [number for _, _, number in whole] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, *([13] if last else [])]
    assert len(found) == 1 if size == 10_000 else len(found) > 3
    assert [piece.start for piece in found[1:]] == [piece.stop for piece in found[:-1]]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv", "a.json", "a.parquet"])
def test_only_plain_files_of_lines_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("lmoe.data.rows.files.SHARD_BYTES", 10)
    file = written(tmp_path / name, LINES)
    assert pieces(file) == ([Piece(file)], hashlib.sha256(LINES).hexdigest())


def test_domains_of_a_folder_are_its_files_and_the_folders_in_it(tmp_path: Path) -> None:
    for name in ("math.jsonl", "sql.csv.gz", "sub/b/x.jsonl", "sub/a.txt", ".hidden.jsonl", ".git/c.jsonl"):
        written(tmp_path / name, b"")
    for number in range(2):
        written(tmp_path / f"web-0000{number}-of-00002.parquet", b"")
    for name in ("README.md", "sub/notes.pdf", "noname"):
        written(tmp_path / name, b"")
    found = folder_of(tmp_path)
    assert [(str(f.relative_to(tmp_path)), d) for f, d in zip(found.files, found.domains, strict=True)] == [
        ("math.jsonl", "math"),
        ("sql.csv.gz", "sql"),
        ("sub/a.txt", "sub"),
        ("sub/b/x.jsonl", "sub"),
        ("web-00000-of-00002.parquet", "web"),
        ("web-00001-of-00002.parquet", "web"),
    ]
    assert found.unread == ["README.md", "noname", "sub/notes.pdf"]


def test_a_link_to_nowhere_is_refused_and_one_to_a_folder_is_named_as_unread(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere" / "b.jsonl", b'{"text": "y"}\n')
    written(tmp_path / "rows" / "a.jsonl", b'{"text": "x"}\n')
    (tmp_path / "rows" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "c.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    assert [row.domain for row in rows_of(tmp_path / "rows")] == ["a", "c"]
    assert folder_of(tmp_path / "rows").unread == ["more"]
    (tmp_path / "rows" / "d.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert refused(tmp_path / "rows") == f"{tmp_path}/rows/d.jsonl: cannot be read: no such file"


@pytest.mark.parametrize("names", [("a.jsonl", "a.csv"), ("a.jsonl", "a.jsonl.gz"), ("a.jsonl", "a/b.jsonl")])
def test_two_files_of_one_domain_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        written(tmp_path / "rows" / name, b'{"text": "x"}\n')
    assert "gives the domain 'a' too; rename one" in refused(tmp_path / "rows")


def test_a_file_name_that_is_no_utf8_is_refused_as_a_domain(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    name = os.fsdecode(b"\xff.jsonl")
    written(tmp_path / "rows" / name, b'{"text": "x"}\n')
    assert refused(tmp_path / "rows").startswith(f"{tmp_path}/rows: the name of '\\udcff' is not UTF-8")


def test_a_file_name_with_a_line_break_is_refused_as_a_domain(tmp_path: Path) -> None:
    written(tmp_path / "rows" / "a\nb.jsonl", b'{"text": "x"}\n')
    assert refused(tmp_path / "rows").startswith(
        f"{tmp_path}/rows: the name of 'a\\nb' must be text without a slash, a"
    )


def test_a_folder_without_files_of_rows_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path}/empty: no file of rows in this folder (.jsonl, ")
    written(tmp_path / "empty" / "a.pdf", b"")
    assert refused(tmp_path / "empty").endswith("each also .gz or .zst); it holds a.pdf")


def test_names_say_kind_and_domain() -> None:
    assert kind_of(Path("A.JSONL.GZ")) == kind_of(Path("b.ndjson")) == "lines"
    assert kind_of(Path("a.gz")) is None and kind_of(Path("jsonl")) is None
    assert stem(Path("a.b.jsonl.zst")) == "a.b" and stem(Path("t-00001-of-00002.Parquet")) == "t"
    assert stem(Path("web-00000-of-00002-a09b74b3ef9c3b56.parquet")) == "web"


def test_a_bad_line_does_not_hide_those_behind_it(tmp_path: Path) -> None:
    content = b'{"text": "x"}\nbad\n\xff\n{"text": "y"}\n'
    found = [record for record, _, _ in Piece(written(tmp_path / "a.jsonl", content))]
    assert [isinstance(record, LmoeError) for record in found] == [False, True, True, False]


def test_reading_a_csv_file_leaves_the_limit_of_pythons_csv_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    file = written(tmp_path / "a.csv", b"text\n" + b"a" * (before + 1) + b"\n")
    assert len(rows_of(file)) == 1
    assert csv.field_size_limit() == before
