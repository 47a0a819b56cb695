"""Where rows are from: files, folders, folders of save_to_disk, and the hub."""

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from lmoe.config.data import DataConfig, SourceConfig
from lmoe.data.rows.row import Row
from lmoe.data.rows.sources import Source, judge_source, open_source, read_rows, sources_of, val_source
from lmoe.errors import DataError
from lmoe.evaluate.questions import read_choices

RECORDS = [{"prompt": "q", "response": str(n)} for n in range(4)]


def rows_of(source: Source, cache: Path) -> list[Row]:
    return list(open_source(source, cache).rows())


def answers(source: Source, cache: Path) -> list[str]:
    return [row.messages[-1]["content"] for row in rows_of(source, cache) if row.messages]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Source], str]:
    """What reading a source is refused with."""

    def read(source: Source) -> str:
        with pytest.raises(DataError) as error:
            rows_of(source, tmp_path / "cache")
        return str(error.value)

    return read


def one(path: Any, **fields: Any) -> Source:
    return Source(key="data.sources.one.path", path=str(path), **fields)


def test_domains_come_from_rows_then_sources_then_file_names(write_rows: Any, tmp_path: Path) -> None:
    write_rows({"text": "x"}, {"text": "y", "domain": "code"}, name="data/math.jsonl")
    (tmp_path / "data" / "sql.txt").write_text("z\n")
    domains = {
        name: [row.domain for row in rows_of(one(tmp_path / "data", domain=name), tmp_path)] for name in (None, "mine")
    }
    assert domains == {None: ["math", "code", "sql"], "mine": ["mine", "code", "mine"]}
    assert [row.domain for row in read_rows(str(tmp_path / "data" / "sql.txt"))] == ["all"]


def test_a_missing_file_and_a_path_that_none_can_be_are_named(refused: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", "./nowhere", "a" * 300 + ".jsonl", "a\0b.jsonl"):
        assert "no such file or folder (from " in refused(one(path))


def test_the_content_of_a_folder_depends_on_names_and_bytes_and_not_on_its_place(
    write_rows: Any, tmp_path: Path
) -> None:
    for name in ("one/a.jsonl", "two/a.jsonl", "three/b.jsonl"):
        write_rows({"text": "x"}, name=name)
    content = {name: open_source(one(tmp_path / name), tmp_path).content for name in ("one", "two", "three")}
    assert content["one"] == content["two"] != content["three"]


def test_a_saved_data_set_is_read_and_one_split_of_several(refused: Any, tmp_path: Path) -> None:
    whole = Dataset.from_list(RECORDS)
    whole.save_to_disk(tmp_path / "whole")
    whole.select([2, 0]).save_to_disk(tmp_path / "chosen")
    DatasetDict({"train": whole.select([0]), "test": whole.select([3])}).save_to_disk(tmp_path / "splits")
    assert answers(one(tmp_path / "whole"), tmp_path) == ["0", "1", "2", "3"]
    assert answers(one(tmp_path / "chosen"), tmp_path) == ["2", "0"]
    assert answers(one(tmp_path / "splits"), tmp_path) == ["0"]
    assert answers(one(tmp_path / "splits", split="test"), tmp_path) == ["3"]
    [row, _] = rows_of(one(tmp_path / "chosen"), tmp_path)
    assert row.where == f"{tmp_path}/chosen[0]"
    assert "no split 'dev'; data.sources.one.split may be train, test" in refused(one(tmp_path / "splits", split="dev"))
    assert "data.sources.one.split is dev, but" in refused(one(tmp_path / "whole", split="dev"))


def test_a_split_of_files_is_refused_because_they_have_none(refused: Any, write_rows: Any, tmp_path: Path) -> None:
    write_rows({"text": "x"}, name="data/a.jsonl")
    for path in ("data", "data/a.jsonl"):
        assert "data.sources.one.split is test, but" in refused(one(tmp_path / path, split="test"))


def test_a_damaged_saved_data_set_is_one_clear_error(refused: Any, tmp_path: Path) -> None:
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "whole")
    for name, content in (("state.json", b"{"), ("data-00000-of-00001.arrow", b"x"), ("dataset_info.json", b"[]")):
        before = (tmp_path / "whole" / name).read_bytes()
        (tmp_path / "whole" / name).write_bytes(content)
        assert "whole: cannot be read: " in refused(one(tmp_path / "whole"))
        (tmp_path / "whole" / name).write_bytes(before)


def test_a_row_of_a_table_that_cannot_be_decoded_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    offsets, characters = (pyarrow.py_buffer(content) for content in (array("i", [0, 1, 2, 3]).tobytes(), b"a\xffb"))
    texts = pyarrow.StringArray.from_buffers(3, offsets, characters)
    Dataset(pyarrow.table({"text": texts})).save_to_disk(tmp_path / "whole")
    [part] = open_source(one(tmp_path / "whole"), tmp_path).parts
    first, bad, last = (row for row, _ in part.rows())
    assert isinstance(first, Row) and isinstance(last, Row) and (first.text, last.text) == ("a", "b")
    assert str(bad).startswith(f"{tmp_path}/whole[1]: cannot be read: 'utf-8' codec can't decode byte 0xff")


def test_a_saved_data_set_within_a_folder_of_files_is_refused_by_name(
    refused: Any, write_rows: Any, tmp_path: Path
) -> None:
    write_rows({"text": "x"}, name="data/state.json")  # a file of rows may be called so
    assert [row.domain for row in rows_of(one(tmp_path / "data"), tmp_path)] == ["state"]
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "data" / "saved")
    assert f"{tmp_path}/data/saved: a folder of save_to_disk; give it on its own" in refused(one(tmp_path / "data"))


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("train_sft-00000-of-00001-a09b74b3ef9c3b56.jsonl", "test_sft-00000-of-00001-6da1b0a2d6d2f5c1.jsonl"),
        ("main/train/a.jsonl", "main/dev/b.jsonl"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_data_set_are_not_read_as_one(
    write_rows: Any, tmp_path: Path, train: str, other: str, streaming: bool
) -> None:
    for name in (train, other):
        write_rows({"text": name}, name=f"clone/{name}")
    with pytest.raises(DataError, match="look like splits of one data set, .* goes into data.val_path") as error:
        open_source(one(tmp_path / "clone"), tmp_path, streaming=streaming)
    shown = ("main/train", "main/dev") if train.startswith("main/") else (train, other)
    assert f"clone: {shown[0]} and {shown[1]} look" in str(error.value)
    assert len(read_rows(str(tmp_path / "clone"))) == 2  # such as texts that are to be left out of others
    assert len(rows_of(one(tmp_path / "clone" / train), tmp_path)) == 1


@pytest.mark.parametrize("other", ["tests.jsonl", "sub/test.jsonl", "test_gen.jsonl", "train-00001-of-00002.jsonl"])
def test_files_that_are_no_splits_beside_a_training_file_are_domains(
    write_rows: Any, tmp_path: Path, other: str
) -> None:
    for name in ("train-00000-of-00002.jsonl", other):
        write_rows({"text": name}, name=f"rows/{name}")
    assert len(rows_of(one(tmp_path / "rows"), tmp_path)) == 2


def test_a_hub_data_set_is_read_with_its_config_split_and_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load(*names: Any, **options: Any) -> Dataset:
        asked.append((names, options))
        return Dataset.from_list([*RECORDS, {"prompt": "q", "response": None}])

    monkeypatch.setattr("datasets.load_dataset", load)
    source = one("who/what", config="main", split="test[:1%]", revision="v2", domain="math")
    found = [row for row, _ in open_source(source, tmp_path).parts[0].rows()]
    assert asked == [(("who/what", "main"), {"split": "test[:1%]", "revision": "v2"})]
    assert [row.domain for row in found[:-1] if isinstance(row, Row)] == ["math"] * 4
    assert str(found[-1]) == "who/what[4]: response must be text, got null"


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionError("Couldn't reach the hub"), FileNotFoundError("no"), ValueError("bad name"), RuntimeError()),
        *(KeyError("train"), ImportError("no zstandard")),
    ],
)
def test_a_hub_name_that_cannot_be_loaded_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, refused: Any, error: Exception
) -> None:
    def refuse(name: str, config: str | None, split: str, revision: str | None) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    text = refused(Source(key="data.path", path="who/what"))
    assert text.startswith("data.path=who/what: neither a local path nor a data set that could be loaded") and (
        "save_to_disk" in text and "\n" not in text
    )


def test_the_configurations_to_choose_from_are_shown(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    assert "['main', 'socratic']" in refused(one("who/what"))


def test_columns_are_those_of_the_source(write_rows: Any, tmp_path: Path, refused: Any) -> None:
    path = write_rows({"question": "q", "answer": "a"})
    columns = {"prompt": "question", "response": "answer"}
    assert answers(one(path, columns=columns), tmp_path) == ["a"]
    assert refused(one(path)).startswith(f"{path}:1: unknown row format with keys ['answer', 'question']; expected ")


def test_sources_of_a_config_are_its_path_or_each_by_its_name(tmp_path: Path) -> None:
    columns = {"prompt": "q"}
    [alone] = sources_of(DataConfig(path="my.jsonl", columns=columns), tmp_path)
    assert alone == Source(key="data.path", path="my.jsonl", columns=columns)
    given = {
        "a": SourceConfig(path="bundled", weight=2.0),
        "b": SourceConfig(path="who/what", domain="x", split="test", config="c", revision="r", columns=columns),
    }
    first, second = sources_of(DataConfig(sources=given), tmp_path)
    assert (first.path, first.domain, first.weight) == (str(tmp_path / "sft" / "train"), "a", 2.0)
    options: dict[str, Any] = {"domain": "x", "split": "test", "config": "c", "revision": "r", "columns": columns}
    assert second == Source(key="data.sources.b.path", path="who/what", **options)


def test_validation_rows_are_given_bundled_or_split_off(tmp_path: Path) -> None:
    val = str(tmp_path / "sft" / "val")
    assert val_source(DataConfig(path="x.jsonl"), tmp_path) is None
    assert val_source(DataConfig(sources={"a": SourceConfig(path="x")}), tmp_path) is None
    for config in (DataConfig(), DataConfig(path="x.jsonl", val_path="bundled")):
        assert val_source(config, tmp_path) == Source(key="data.val_path", path=val)
    given = val_source(DataConfig(path="x.jsonl", val_path="y.jsonl", columns={"text": "t"}), tmp_path)
    assert given == Source(key="data.val_path", path="y.jsonl", columns={"text": "t"})


@pytest.mark.parametrize(("name", "folder"), [("bundled", "sft"), ("bundled_preference", "preference")])
def test_the_name_of_what_ships_with_lmoe_says_which_folder_each_key_reads(
    tmp_path: Path, name: str, folder: str
) -> None:
    own = DataConfig(path=name)
    places = {part: str(tmp_path / folder / part) for part in ("train", "val", "judge")}
    assert own.is_bundled and not own.splits_val
    assert sources_of(own, tmp_path) == [Source(key="data.path", path=places["train"])]
    assert val_source(own, tmp_path) == Source(key="data.val_path", path=places["val"])
    assert judge_source(own, tmp_path) == Source(key="data.judge_path", path=places["judge"])
    [named] = sources_of(DataConfig(sources={"a": SourceConfig(path=name)}), tmp_path)
    assert named.path == places["train"]
    other = DataConfig(path="x.jsonl", val_path=name, judge_path=name, columns={"prompt": "q"})
    assert val_source(other, tmp_path) == Source(key="data.val_path", path=places["val"])
    assert judge_source(other, tmp_path) == Source(key="data.judge_path", path=places["judge"])


def test_columns_name_keys_of_the_bundled_pairs_where_they_are_trained_on(tmp_path: Path) -> None:
    columns = {"response": "chosen"}
    config = DataConfig(path="bundled_preference", columns=columns)
    found = [*sources_of(config, tmp_path), val_source(config, tmp_path), judge_source(config, tmp_path)]
    assert [source.columns for source in found if source is not None] == [columns] * 3
    instructions = DataConfig(path="bundled", val_path="y.jsonl", columns=columns)
    assert sources_of(instructions, tmp_path)[0].columns == {}


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
