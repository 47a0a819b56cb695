"""Sources read: all bad rows at once, nothing half written, the same from several processes, two runs and the cache."""

import gzip
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lmoe.config.data import DataConfig
from lmoe.data.account import Account
from lmoe.data.cache import load_source, load_tensors
from lmoe.data.encode import Chunk, EncodedSource, Encoder
from lmoe.data.encoded import BY_ROW
from lmoe.data.reader import BYTES_FOR_PROCESSES, Reader
from lmoe.data.rows.sources import Part, Source
from lmoe.errors import DataError
from lmoe.files.resources import resource_dir
from lmoe.vocabulary import OnBadRow

Read = Callable[..., EncodedSource]


@pytest.fixture
def reader(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Reader]:
    def make(**options: Any) -> Reader:
        return Reader(DataConfig(cache_dir=str(tmp_path / "cache"), max_length=64, **options), tokenizer)

    return make


def source(path: Any, **options: Any) -> Source:
    return Source(key="data.path", path=str(path), **options)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*")) if cache.exists() else []


def same(one: EncodedSource, other: EncodedSource) -> bool:
    """Whether every tensor, domain and count is equal."""
    tensors = [(getattr(one.rows, name), getattr(other.rows, name)) for name in BY_ROW]
    tensors += [
        (getattr(a, name), getattr(b, name))
        for a, b in zip(one.rows.tokens, other.rows.tokens, strict=True)
        for name in ("input_ids", "is_label")
    ]
    equal = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)
    return equal and (one.domains, one.account) == (other.domains, other.account)


GOOD = [json.dumps({"prompt": f"What is {n}?", "response": f"It is {n}.", "id": n}) for n in range(20)]
BAD = ["not JSON", '{"prompt": 1, "response": "x"}', '{"q": "x"}', "[]", '{"messages": []}', '{"text": null}', "{"]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """20 good rows, of which each third has a bad one behind it; one is cut and one is empty."""
    lines = [line for n, good in enumerate(GOOD) for line in (good, *BAD[n // 3 : n // 3 + 1] * (n % 3 == 0))]
    lines += ['{"prompt": "q", "response": ""}', json.dumps({"text": "four " * 100, "domain": "z"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_all_bad_rows_come_in_one_message_and_nothing_is_written(
    reader: Callable[..., Reader], mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        reader().read(source(mixed))
    first, *named, last, advice = str(refused.value).splitlines()
    assert first == "7 of 29 rows cannot be used; mend them, or leave them out with data.on_bad_row=drop:"
    assert [line.split(": ")[0] for line in named] == [f"  {mixed}:{number}" for number in (2, 6, 10, 14, 18)]
    assert "malformed JSON" in named[0] and "prompt must be text, got 1" in named[1] and last == "  and 2 more"
    assert advice == "  data.columns={prompt: question, response: answer} names other keys"
    assert left_in(tmp_path / "cache") == []


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(
    reader: Callable[..., Reader], mixed: Path, tmp_path: Path
) -> None:
    one = reader(on_bad_row=OnBadRow.drop)
    found = one.read(source(mixed))
    account = found.account
    assert (account.read, account.bad, len(found.rows), account.truncated) == (29, 7, 21, 1)
    assert account.first_bad[0].startswith(f"{mixed}:2: malformed JSON") and len(account.first_bad) == 5
    assert account.dropped == {"no assistant text": 1} and account.ignored == {"id": 20}
    assert account.formats == {"prompt and response": 21, "text": 1}
    again = reader(on_bad_row=OnBadRow.drop)
    assert same(found, again.read(source(mixed)))
    assert ([r.cache_hit for r in one.reports], [r.cache_hit for r in again.reports]) == ([False], [True])
    with pytest.raises(DataError, match="7 of 29 rows cannot be used"):
        reader().read(source(mixed))  # what is in the cache is refused as well


def test_rows_that_the_template_refuses_come_in_one_message_with_the_others(
    reader: Callable[..., Reader], tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    good, refused = {"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a", "system": "s"}
    path = write_rows(good, refused, {"q": 1}, refused, good)
    with pytest.raises(DataError) as error:
        reader().read(source(path))
    head, *named, advice = str(error.value).splitlines()
    assert head.startswith("3 of 5 rows cannot be used") and "the chat template refuses" in named[0]
    assert [line.split(": ")[0] for line in named] == [f"  {path}:2, {path}:4", f"  {path}:3"]
    assert advice.startswith("  data.columns=")
    found = reader(on_bad_row=OnBadRow.drop).read(source(path))
    assert (found.account.bad, len(found.rows)) == (3, 2)


def test_a_single_bad_row_of_many_is_named_with_the_way_out(reader: Callable[..., Reader], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([*GOOD, '{"text": 3}']))
    with pytest.raises(DataError) as refused:
        reader().read(source(tmp_path / "rows.jsonl"))
    assert "1 of 21 rows cannot be used" in str(refused.value) and "data.on_bad_row=drop" in str(refused.value)
    assert f"{tmp_path}/rows.jsonl:21: text must be text, got 3" in str(refused.value)


def test_only_bad_rows_are_refused_even_where_they_are_dropped(reader: Callable[..., Reader], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(BAD))
    with pytest.raises(
        DataError, match=r"all 7 rows were dropped \(7 cannot be used, such as .*rows.jsonl:1: malformed"
    ):
        reader(on_bad_row=OnBadRow.drop).read(source(tmp_path / "rows.jsonl"))
    assert left_in(tmp_path / "cache") == []


NOT_FOR_SFT = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen and rejected are two answers to compare"),
    ({"prompt": "q", "response": "a", "label": False}, "label is false, which marks a bad answer"),
    ({"prompt": "q", "answer": "4"}, "answer is what answers are checked against"),
]


@pytest.mark.parametrize(("record", "message"), NOT_FOR_SFT)
def test_rows_that_supervised_tuning_cannot_learn_are_refused_by_name(
    reader: Callable[..., Reader], write_rows: Any, record: dict[str, Any], message: str
) -> None:
    path = write_rows(record)
    with pytest.raises(DataError) as refused:
        reader().read(source(path))
    assert str(refused.value).startswith(f"{path}:1: {message}")


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, {"response": "chosen"}),
        (
            {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}], "rejected": []},
            None,
        ),
        ({"prompt": "q", "answer": "good"}, {"response": "answer"}),
    ],
)
def test_the_columns_that_such_a_message_advises_learn_the_answer(
    reader: Callable[..., Reader], write_rows: Any, tokenizer: PreTrainedTokenizerFast, record: Any, columns: Any
) -> None:
    found = reader().read(source(write_rows(record), columns=columns or {"messages": "chosen"}))
    [row] = found.rows
    assert "good" in tokenizer.decode(row.input_ids[row.is_label])


def test_an_answer_to_check_is_said_to_be_ignored_beside_a_response(
    reader: Callable[..., Reader], write_rows: Any
) -> None:
    path = write_rows({"prompt": "q", "response": "It is four.", "answer": "4", "label": True})
    assert reader().read(source(path)).account.ignored == {"answer": 1}


def test_an_interrupt_leaves_nothing_in_the_cache(
    reader: Callable[..., Reader], mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        assert any(name.startswith(".writing-") for name in left_in(tmp_path / "cache"))
        raise KeyboardInterrupt

    monkeypatch.setattr("lmoe.data.cache.Collected.source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader().read(source(mixed))
    assert left_in(tmp_path / "cache") == []


def test_several_processes_give_the_same_as_one(
    reader: Callable[..., Reader], mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a", "b"):
        (tmp_path / "more" / f"{name}.jsonl").write_bytes(mixed.read_bytes())
    (tmp_path / "more" / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(GOOD).encode()))
    Dataset.from_list([json.loads(good) for good in GOOD]).to_parquet(tmp_path / "more" / "d.parquet")
    monkeypatch.setattr("lmoe.data.rows.files.SHARD_BYTES", 400)
    monkeypatch.setattr("lmoe.data.rows.tables.SHARD_ROWS", 7)
    monkeypatch.setattr("lmoe.data.encode.CHUNK", 3)
    found = []
    for processes in (1, 2):
        one = reader(on_bad_row=OnBadRow.drop, num_proc=processes)
        one.config.cache_dir = str(tmp_path / f"cache{processes}")
        found.append(one.read(source(tmp_path / "more")))
        assert not one.reports[0].cache_hit
    assert same(*found)
    assert found[0].domains == ["a", "b", "c", "d", "z"] and len(found[0].rows) == 82
    assert found[0].rows.places[:3].tolist() == [[0, 1], [0, 3], [0, 4]]


def test_the_bytes_of_a_source_decide_on_processes_and_not_its_files(
    reader: Callable[..., Reader], mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def in_processes(parts: list[Part], encoder: Encoder, processes: int) -> Iterator[Chunk]:
        started.append(processes)
        return (chunk for part in parts for chunk in encoder.chunks(part.rows(), part.place))

    monkeypatch.setattr("lmoe.data.reader._in_processes", in_processes)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    (tmp_path / "more").mkdir()
    for number in range(8):
        (tmp_path / "more" / f"{number}.jsonl").write_text("\n".join(GOOD))
    Dataset.from_list([json.loads(good) for good in GOOD]).to_parquet(tmp_path / "more" / "table.parquet")
    reader().read(source(tmp_path / "more"))
    assert started == []
    bundled = resource_dir("data/sft") / "train"
    assert 0 < sum(file.stat().st_size for file in bundled.iterdir()) < BYTES_FOR_PROCESSES
    monkeypatch.setattr("lmoe.data.reader.BYTES_FOR_PROCESSES", 8 * len("\n".join(GOOD)) + 1)
    one = reader()
    one.config.cache_dir = str(tmp_path / "another")
    one.read(source(tmp_path / "more"))
    assert started == [2]


def test_a_torn_file_in_a_process_is_one_clear_error(
    reader: Callable[..., Reader], mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_text("\n".join(GOOD))
    (tmp_path / "more" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(GOOD).encode())[:-9])
    monkeypatch.setattr("lmoe.data.rows.files.SHARD_BYTES", 400)
    with pytest.raises(DataError) as refused:
        reader(num_proc=2).read(source(tmp_path / "more"))
    assert str(refused.value).startswith(f"{tmp_path}/more/b.jsonl.gz: cannot be read: ")
    assert left_in(tmp_path / "cache") == []


def read_beside(cache: str, path: str, tokenizer: PreTrainedTokenizerFast, start: Any, done: Any) -> None:
    start.wait()
    one = Reader(DataConfig(cache_dir=cache, max_length=64), tokenizer)
    done.put(len(one.read(source(path)).rows))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_runs_beside_each_other_leave_one_whole_file(
    reader: Callable[..., Reader], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(GOOD))
    forked = multiprocessing.get_context("fork")
    start, done = forked.Barrier(2), forked.Queue()
    given = (str(tmp_path / "cache"), str(tmp_path / "rows.jsonl"), tokenizer, start, done)
    runs = [forked.Process(target=read_beside, args=given) for _ in range(2)]
    for run in runs:
        run.start()
    assert [done.get(timeout=60) for _ in runs] == [20, 20]
    for run in runs:
        run.join()
    [name] = left_in(tmp_path / "cache")
    after = reader()
    after.read(source(tmp_path / "rows.jsonl"))
    assert after.reports[0].cache_hit and str(after.reports[0].cache_path).endswith(name)


def test_how_a_source_is_read_is_a_part_of_its_key(
    reader: Callable[..., Reader], write_rows: Any, tmp_path: Path
) -> None:
    path = write_rows({"prompt": "q", "response": "four", "other": "six"})
    for options in ({}, {"domain": "mine"}, {"columns": {"response": "other"}}):
        one = reader()
        one.read(source(path, **options))
        assert not one.reports[0].cache_hit
    assert len(left_in(tmp_path / "cache")) == 3


def test_the_account_comes_back_equal_from_the_cache(reader: Callable[..., Reader], mixed: Path) -> None:
    one = reader(on_bad_row=OnBadRow.drop)
    found = one.read(source(mixed))
    report = one.reports[0]
    stored = load_source(Path(str(report.cache_path)), report.key)
    assert stored is not None and stored.account == found.account and same(stored, found)
    assert load_source(Path(str(report.cache_path)), "another key") is None
    assert Account.of_json(json.loads(json.dumps(found.account.to_json()))) == found.account


def test_a_cache_that_may_not_be_read_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as that of another user, under a home folder that a container was given."""

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    assert load_tensors(tmp_path / "rows.safetensors", "key", ()) is None
