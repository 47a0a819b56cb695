"""Rows that are read while training: order, blocks, totals, and going on."""

import gzip
import json
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from lmoe.config.data import DataConfig, SourceConfig
from lmoe.data.collate import Collate
from lmoe.data.datamodule import TrainingData
from lmoe.data.prepare import prepare
from lmoe.data.stream import RowStream, StreamLoader
from lmoe.errors import DataError
from lmoe.vocabulary import OnBadRow


def records(count: int, domain: str = "a", name: str = "") -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {name} {n}?", "response": "six " * (n % 7 + 1), "domain": domain} for n in range(count)
    ]


@pytest.fixture
def config(tmp_path: Path, write_rows: Any) -> DataConfig:
    """Three files of two domains, 50 rows in all, in blocks of 16."""
    for name, domain, count in (("x", "a", 20), ("y", "b", 17), ("z", "a", 13)):
        write_rows(*records(count, domain, name), name=f"train/{name}.jsonl")
    return DataConfig(
        path=str(tmp_path / "train"),
        val_path=write_rows(*records(3), *records(3, "b"), name="val.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        max_length=64,
        batch_size=2,
        packing=False,
        streaming=True,
        shuffle_buffer=16,
    )


def data(config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, max_steps: int = 12) -> TrainingData:
    prepared = prepare(config, tokenizer, seed=seed, bundled=Path("nowhere"), packing_model_type="qwen3")
    assert isinstance(prepared.train, RowStream)
    return TrainingData(
        prepared,
        config,
        units=lambda samples: samples.label_counts,
        collate=Collate,
        seed=seed,
        max_steps=max_steps,
        accumulate_grad_batches=3,
        pad_token_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
    )


def loader(config: DataConfig, tokenizer: PreTrainedTokenizerFast, **options: Any) -> StreamLoader:
    found = data(config, tokenizer, **options).train_dataloader()
    assert isinstance(found, StreamLoader)
    return found


def same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in zip(found, expected, strict=True)
    )


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["valid_mask"], strict=True)
    ]


def test_a_pass_gives_every_row_once_in_an_order_of_its_own(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    config.batch_size = 5
    rows = rows_of(list(loader(config, tokenizer, max_steps=7))[:20])
    first, second = rows[:50], rows[50:]
    assert Counter(first) == Counter(second) and len(set(first)) == 50
    assert first != second
    assert rows_of(list(loader(config, tokenizer, seed=1, max_steps=7))[:10]) != first


@pytest.mark.parametrize("packing", [False, True])
def test_a_loader_goes_on_where_it_was_cut_whatever_the_place(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, packing: bool
) -> None:
    config.packing = packing
    whole = list(loader(config, tokenizer))
    assert len(whole) == 36
    for cut in (1, 3, 8, 9, 17, 35, 36):
        begun = loader(config, tokenizer)
        for _, _ in zip(range(cut), begun, strict=False):
            pass
        state = json.loads(json.dumps(begun.state_dict()))
        resumed = loader(config, tokenizer)
        resumed.load_state_dict(state)
        assert same(list(resumed), whole[cut:]), cut


def test_several_sources_are_mixed_by_weight_and_gone_on_with(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any
) -> None:
    config.path = ""
    config.sources = {
        "a": SourceConfig(path=write_rows(*records(30, "a"), name="a.jsonl"), weight=3),
        "b": SourceConfig(path=write_rows(*records(30, "b"), name="b.jsonl"), weight=1),
    }
    config.batch_size = 10
    whole = list(loader(config, tokenizer, max_steps=20))
    domains = torch.cat([batch["domain_ids"][:, 0] for batch in whole])
    assert 0.2 < float((domains == 1).float().mean()) < 0.3
    begun = loader(config, tokenizer, max_steps=20)
    for _, _ in zip(range(31), begun, strict=False):
        pass
    resumed = loader(config, tokenizer, max_steps=20)
    resumed.load_state_dict(begun.state_dict())
    assert same(list(resumed), whole[31:])


def test_a_source_of_weight_0_is_left_out_of_a_stream_and_kept_in_its_report(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.path, config.batch_size = "", 10
    left_out = SourceConfig(path=write_rows(*records(30, "b", "left out"), name="b.jsonl"), weight=0)
    read = SourceConfig(path=write_rows(*records(30, "a"), name="a.jsonl"), weight=1)
    config.sources = {"b": left_out, "a": read}
    prepared = data(config, tokenizer).prepared
    assert isinstance(prepared.train, RowStream) and prepared.train.first_domains(100) == ["a"]
    assert len(prepared.train.first_rows(100)) == 30
    assert [source.path for source in prepared.report.sources[:2]] == [left_out.path, read.path]
    assert {left_out.path, read.path} <= prepared.report.data_hashes.keys()
    rows = rows_of(list(loader(config, tokenizer, max_steps=2)))
    assert Counter(rows[:30]) == Counter(rows[30:]) and len(set(rows)) == 30
    assert not any("left out" in tokenizer.decode(row) for row in rows)
    config.domains = ["b"]
    with pytest.raises(DataError, match="a pass over 30 rows gave none to learn from"):
        next(iter(loader(config, tokenizer)))


def test_ranks_share_what_one_process_would_see_and_all_know_the_totals(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = data(config, tokenizer).train_dataloader()
    assert isinstance(alone, StreamLoader)
    ranks = []
    for rank in range(3):
        of_rank = data(config, tokenizer).train_dataloader()
        assert isinstance(of_rank, StreamLoader)
        of_rank.rank, of_rank.world_size, of_rank.micro_batches, of_rank.num_batches = rank, 3, 1, 12
        ranks.append(of_rank)
    streams = [iter(one) for one in ranks]
    whole = iter(alone)
    for step in range(12):
        batches = [next(whole) for _ in range(3)]
        assert same([next(one) for one in streams], batches)
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        valid = sum(int(batch["valid_mask"].sum()) for batch in batches)
        assert {one.window_totals(step) for one in (alone, *ranks)} == {(labels, valid)}


def test_a_row_that_cannot_be_used_ends_the_run_or_is_counted(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    write_rows(*records(4), {"question": "x"}, name="train/x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl:5: unknown row format"):
        list(loader(config, tokenizer))
    config.on_bad_row = OnBadRow.drop
    with pytest.warns(UserWarning, match=r"pass 1 left out 1 of 35 rows: 1 cannot be used.*x\.jsonl:5"):
        list(loader(config, tokenizer, max_steps=8))


def test_a_domain_that_nothing_names_before_is_refused(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    write_rows(*records(4, "unheard"), name="train/x.jsonl")
    with pytest.raises(
        DataError, match="a row is of the domain 'unheard', which no source, file or validation row has"
    ):
        list(loader(config, tokenizer))


def test_a_pass_without_a_row_to_learn_from_is_refused(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.path = write_rows({"prompt": "x", "response": ""}, name="empty.jsonl")
    with pytest.raises(DataError, match="a pass over 1 rows gave none to learn from"):
        list(loader(config, tokenizer))


def test_a_table_is_read_while_training_as_lines_are(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any
) -> None:
    rows = records(40)
    config.path = write_rows(*rows, name="rows.jsonl")
    lines = list(loader(config, tokenizer))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config.path = str(tmp_path / "rows.parquet")
    assert same(list(loader(config, tokenizer)), lines)
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    config.path = str(tmp_path / "rows.parquet.gz")
    with pytest.raises(DataError, match=r"rows\.parquet\.gz: a compressed table cannot be read while training"):
        data(config, tokenizer)


def test_a_file_that_ends_too_early_ends_the_run_by_name(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = gzip.compress("".join(json.dumps(record) + "\n" for record in records(500)).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[:-12])
    config.path = str(tmp_path / "torn.jsonl.gz")
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz: cannot be read"):
        list(loader(config, tokenizer, max_steps=100))


def test_the_largest_batch_holds_the_longest_samples_of_a_block(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    longest = data(config, tokenizer).largest_batch()["valid_mask"].sum(1)
    every = torch.cat([batch["valid_mask"].sum(1) for batch in list(loader(config, tokenizer))[:8]])
    assert longest.tolist() == every.sort(descending=True).values[:2].tolist()


def test_rows_of_domains_that_are_not_chosen_are_left_out_of_a_stream_and_counted(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    write_rows(*records(5, "unknown", "w"), name="train/w.jsonl")
    config.domains, config.batch_size = ["b"], 1
    stream = loader(config, tokenizer, max_steps=6)
    with pytest.warns(
        UserWarning, match="pass 1 left out 38 of 55 rows: 38 of domains that data.domains does not name"
    ):
        batches = list(stream)
    rows = rows_of(batches)
    assert all("What is y " in tokenizer.decode(row) for row in rows) and len(set(rows)) == 17
    assert all(not batch["domain_ids"].any() for batch in batches)
    prepared = data(config, tokenizer).prepared
    assert prepared.domains == ["b"] and len(prepared.val) == 3
    [note] = prepared.report.notes()
    assert "leaves out 3 validation rows, and training rows as they are read of other domains: a" in note
    config.domains = ["law"]
    with pytest.raises(DataError, match=r"data\.domains names law, of which there is no row; the rows are of a, b"):
        data(config, tokenizer)


def test_a_stream_puts_the_prefix_before_prompts_and_says_which_rows_have_no_place_for_it(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    write_rows({"text": "six", "domain": "a"}, name="train/w.jsonl")
    config.prompt_prefix, config.batch_size = "{domain}: ", 5
    with pytest.warns(UserWarning, match="pass 1: 1 of 51 rows have no message of the user, so data.prompt_prefix is"):
        rows = [tokenizer.decode(row) for row in rows_of(list(loader(config, tokenizer, max_steps=4)))]
    assert all(f"{'b' if ' y ' in text else 'a'}: What is" in text for text in rows if "What" in text)
    val = data(config, tokenizer).prepared.val
    assert [f"{'ab'[row.domain]}: What is" in tokenizer.decode(row.input_ids) for row in val] == [True] * 6


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("response", datetime(2026, 1, 31)), ("response", b"six"), ("response", Decimal("1.5"))),
        *(("response", None), ("prompt", None), ("domain", date(2026, 1, 31))),
    ],
)
def test_a_row_of_a_table_is_refused_in_the_words_that_it_gets_before_training(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str, field: str, value: Any
) -> None:
    table = pyarrow.Table.from_pylist([{"prompt": "x", "response": "y", field: value}])
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    config.path = str(path)
    with pytest.raises(DataError) as while_training:
        list(loader(config, tokenizer))
    config.streaming, config.shuffle_buffer = False, 10_000
    with pytest.raises(DataError) as before:
        prepare(config, tokenizer, seed=0, bundled=Path("nowhere"), packing_model_type="qwen3")
    assert str(while_training.value) == str(before.value)
    assert f"{field} must be text" in str(before.value)


def test_a_date_that_nobody_reads_is_ignored_by_name_while_training(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [record | {"when": datetime(2026, 1, 31)} for record in records(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config.path = str(tmp_path / "rows.parquet")
    with pytest.warns(UserWarning, match="data: fields that are ignored: when") as said:
        list(loader(config, tokenizer))
    assert len([one for one in said if "ignored" in str(one.message)]) == 1


def test_turns_whose_end_is_not_learnt_are_told_while_training(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.warns(UserWarning, match="the end of .* is not learnt: .* the model will not learn to stop") as said:
        list(loader(config, tokenizer))
    assert len(said) == 1


def test_a_table_without_rows_is_passed_over(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = set(rows_of(list(loader(config, tokenizer, max_steps=9))))
    parquet.write_table(pyarrow.Table.from_pylist(records(1)).slice(0, 0), tmp_path / "train" / "w.parquet")
    assert set(rows_of(list(loader(config, tokenizer, max_steps=9)))) == found
    assert len(found) == 50


def test_a_damaged_table_ends_the_run_by_name(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "rows.parquet")
    config.path = str(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet\[0\]: cannot be read: "):
        list(loader(config, tokenizer))
