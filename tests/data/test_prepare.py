"""From config to rows: cache, splits, domains, report."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lmoe.config.data import DataConfig, SourceConfig
from lmoe.data.encoded import BY_ROW
from lmoe.data.pack import PackedRows
from lmoe.data.prepare import PreparedData, prepare
from lmoe.errors import DataError
from lmoe.pretrain.bpe import train_bpe
from lmoe.vocabulary import OnBadRow
from tests.data.chats.templates import WITHOUT_GENERATION


def pair(number: int, domain: str = "all") -> dict[str, str]:
    return {"prompt": f"What is {number}?", "response": f"It is {number}.", "domain": domain}


@pytest.fixture
def config(write_rows: Any, tmp_path: Path) -> DataConfig:
    rows = [pair(n, "math" if n % 2 else "code") for n in range(40)]
    return DataConfig(path=write_rows(*rows), cache_dir=str(tmp_path / "cache"), val_fraction=0.2, max_length=64)


def run(config: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options: Any) -> PreparedData:
    given = {"bundled": Path("nowhere"), "packing_model_type": None, **options}
    return prepare(config, tokenizer, seed=seed, **given)


def hits(data: PreparedData) -> list[bool]:
    return [source.cache_hit for source in data.report.sources]


def texts(rows: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row.input_ids) for row in rows]


def test_second_call_hits_the_cache_and_gives_the_same(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = run(config, tokenizer), run(config, tokenizer)
    assert (hits(first), hits(second)) == ([False], [True])
    for a, b in ((first.train, second.train), (first.val, second.val)):
        assert len(a) == len(b) > 0
        for one, other in zip(a, b, strict=True):
            assert one.input_ids.equal(other.input_ids) and one.is_label.equal(other.is_label)
            assert one.domain == other.domain
        assert all(getattr(a, name).equal(getattr(b, name)) for name in BY_ROW)
    assert (first.report.train, first.report.data_hashes) == (second.report.train, second.report.data_hashes)
    assert [file.name for file in Path(str(config.cache_dir)).iterdir()] == [
        Path(str(first.report.sources[0].cache_path)).name
    ]


def test_the_cache_does_not_depend_on_seed_split_batches_or_padding(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    run(config, tokenizer)
    config.val_fraction, config.batch_size, config.packing = 0.5, 3, True
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert hits(run(config, tokenizer, seed=1)) == [True]


def change_rows(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    file = Path(config.path)
    file.write_text(file.read_text().replace("It is 3.", "It is 4."))


def change_length(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.max_length = 63


def change_template(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = WITHOUT_GENERATION


def change_template_file(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.chat_template = str(Path(config.path).parent / "template.jinja")
    Path(config.chat_template).write_text(WITHOUT_GENERATION)


def change_special_token(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = "<|endoftext|>"


def change_vocabulary(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["What"])


def change_prompt_prefix(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.prompt_prefix = "{domain}: "


KEY_PARTS = [
    change_prompt_prefix,
    change_rows,
    change_length,
    change_template,
    change_template_file,
    change_special_token,
    change_vocabulary,
]


@pytest.mark.parametrize("change", KEY_PARTS)
def test_every_part_of_the_key_makes_a_miss(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, change: Any
) -> None:
    run(config, tokenizer)
    change(config, tokenizer)
    assert hits(run(config, tokenizer)) == [False]
    assert hits(run(config, tokenizer)) == [True]


def test_another_tokenizer_makes_a_miss(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    run(config, tokenizer)
    assert hits(run(config, train_bpe(["other words"], 300, 512))) == [False]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign"])
def test_a_damaged_cache_file_is_rebuilt(config: DataConfig, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    first = run(config, tokenizer)
    file = Path(str(first.report.sources[0].cache_path))
    whole = file.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    file.write_bytes({"torn": whole[:-9], "flipped": flipped, "empty": b"", "foreign": b"{}" * 99}[damage])
    again = run(config, tokenizer)
    assert hits(again) == [False] and file.read_bytes() == whole
    assert hits(run(config, tokenizer)) == [True]


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match=r"not cached.*data\.cache_dir"):
        data = run(config, tokenizer)
    assert len(data.train) == 32 and data.report.sources[0].cache_path is None
    assert "not written" in data.report.lines()[0]


def test_the_cache_is_in_the_users_cache_folder(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.cache_dir = None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert str(run(config, tokenizer).report.sources[0].cache_path).startswith(str(tmp_path / "xdg" / "lmoe"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(run(config, tokenizer).report.sources[0].cache_path).startswith(str(tmp_path / ".cache" / "lmoe"))


def test_the_seeded_split_is_whole_disjoint_and_deterministic(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, again, other = run(config, tokenizer), run(config, tokenizer), run(config, tokenizer, seed=1)
    train, val = texts(data.train, tokenizer), texts(data.val, tokenizer)
    assert (len(train), len(val)) == (32, 8) and len({*train, *val}) == 40
    assert texts(again.val, tokenizer) == val != texts(other.val, tokenizer)
    assert data.val.domains.bincount().tolist() == [4, 4]


def test_a_domain_of_validation_alone_and_one_of_training_alone_work(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.val_path = write_rows(pair(1, "a"), pair(2, "math"), name="val.jsonl")
    data = run(config, tokenizer)
    assert data.domains == ["a", "code", "math"]
    assert data.val.domains.tolist() == [0, 2] and set(data.train.domains.tolist()) == {1, 2}
    assert len(data.report.sources) == 2 and data.report.val.rows_by_domain == {"a": 1, "math": 1}


def test_first_validation_rows_of_each_domain(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.val_path = write_rows(*(pair(n, "b" if n % 3 else "a") for n in range(12)), name="val.jsonl")
    config.val_rows_per_domain = 2
    found = texts(run(config, tokenizer).val, tokenizer)
    assert [text.split("What is ")[1].split("?")[0] for text in found] == ["0", "1", "2", "3"]


def test_bundled_is_the_callers_folder(config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any) -> None:
    write_rows(pair(1), pair(2), name="share/sft/train/math.jsonl")
    val = Path(write_rows(pair(3), name="share/sft/val/math.jsonl"))
    config.path = "bundled"
    data = run(config, tokenizer, bundled=val.parents[2])
    assert (len(data.train), len(data.val)) == (2, 1)
    assert data.report.data_hashes[str(val)] == hashlib.sha256(val.read_bytes()).hexdigest()


def test_all_rows_dropped_is_an_error_with_counts_and_remedy(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.max_length = 4
    with pytest.raises(DataError, match=r"data\.path=.*all 40 rows.*40 nothing left after truncation to 4.*max_length"):
        run(config, tokenizer)
    config.max_length = 64
    config.val_path = write_rows({"prompt": "q", "response": " "}, name="val.jsonl")
    with pytest.raises(DataError, match=r"data\.val_path=.*all 1 rows.*1 no assistant text.*change the rows"):
        run(config, tokenizer)


def test_packing_keeps_every_row_and_reports_its_fill(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = run(config, tokenizer)
    config.packing = True
    data = run(config, tokenizer, packing_model_type="qwen3")
    assert isinstance(data.train, PackedRows)
    unpacked = [row for rows in data.train for row in rows]
    assert sorted(texts(unpacked, tokenizer)) == sorted(texts(plain.train, tokenizer))
    assert data.report.train.packed_sequences == len(data.train) < len(plain.train)
    assert data.report.train.fill == sum(len(row) for row in unpacked) / (len(data.train) * 64)
    with pytest.raises(DataError, match=r"data\.packing=true: model type qwen3_5"):
        run(config, tokenizer, packing_model_type="qwen3_5")


def test_the_report_counts_what_is_in_the_rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.path = write_rows(pair(1), pair(2), {"prompt": "q", "response": ""}, {"text": "four " * 80})
    data = run(config, tokenizer)
    [source], train, val = data.report.sources, data.report.train, data.report.val
    assert (source.account.read, source.kept, source.account.truncated) == (4, 3, 1)
    assert source.account.dropped == {"no assistant text": 1}
    assert train.rows + val.rows == 3 and train.tokens == int(data.train.lengths.sum())
    assert train.label_tokens == sum(int(row.is_label[1:].sum()) for row in data.train)
    assert train.lengths["max"] == int(data.train.lengths.max())
    assert train.lengths["min"] == int(data.train.lengths.min())
    [line] = data.report.lines()
    assert "4 rows read, 3 kept, 1 cut to length; 1 dropped: no assistant text; formats: " in line
    assert "; formats: prompt and response (3), text (1); cache miss, " in line
    assert ("rows", "2", "1") in data.report.table()


def test_a_hub_data_set_is_cached_by_its_rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [pair(n) for n in range(9)]
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split, revision: Dataset.from_list(rows))
    config.path = "who/what"
    assert (hits(run(config, tokenizer)), hits(run(config, tokenizer))) == ([False], [True])
    rows.append(pair(10))
    assert hits(run(config, tokenizer)) == [False]


def test_stored_ids_are_int32(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    assert run(config, tokenizer).train[0].input_ids.dtype == torch.int32


@pytest.fixture
def two(config: DataConfig, write_rows: Any) -> DataConfig:
    """A large source and a small one, in place of one path."""
    large = write_rows(*({"text": f"large {n}"} for n in range(40)), name="large.jsonl")
    small = write_rows(*({"text": f"small {n}"} for n in range(10)), name="small.jsonl")
    config.path, config.sources = "", {"a": SourceConfig(path=large), "b": SourceConfig(path=small, domain="little")}
    return config


def counts(data: PreparedData) -> dict[str, int]:
    return dict(zip(data.domains, torch.bincount(data.train.domains, minlength=2).tolist(), strict=True))


def test_several_sources_are_read_and_split_each_by_its_domain(
    two: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = run(two, tokenizer)
    assert data.domains == ["a", "little"] and counts(data) == {"a": 32, "little": 8}
    assert data.val.domains.bincount().tolist() == [8, 2] and data.report.mixed is None
    assert [source.path for source in data.report.sources] == [source.path for source in two.sources.values()]


def test_weights_of_sources_make_up_an_epoch_of_training_rows(
    two: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    two.sources["a"].weight, two.sources["b"].weight = 1.0, 3.0
    data, again, other = run(two, tokenizer), run(two, tokenizer), run(two, tokenizer, seed=1)
    assert counts(data) == {"a": 32, "little": 96} and data.report.train.rows == 40
    assert data.report.mixed is not None and data.report.mixed.rows_by_domain == {"a": 32, "little": 96}
    assert "an epoch of the mixture has 128 rows: a 25%, little 75%" in data.report.lines()
    assert texts(data.train, tokenizer) == texts(again.train, tokenizer) != texts(other.train, tokenizer)
    assert len({*texts(data.train, tokenizer)}) == 40 and len(data.val) == 10 and hits(again) == [True, True]
    two.sources["b"].weight = 0.0
    left = run(two, tokenizer)
    assert counts(left) == {"a": 32, "little": 0} and len(left.val) == 10


def test_temperature_draws_domains_by_a_root_of_their_size(two: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    two.temperature = 1.0
    plain = run(two, tokenizer)
    assert counts(plain) == {"a": 32, "little": 8}
    two.temperature = 2.0
    assert counts(run(two, tokenizer)) == {"a": 32, "little": 16}
    two.temperature = 0.01
    with pytest.raises(DataError, match=r"data\.temperature, make an epoch of"):
        run(two, tokenizer)


def test_a_mixture_is_packed_whole(two: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    two.sources["a"].weight, two.sources["b"].weight, two.packing = 1.0, 1.0, True
    data = run(two, tokenizer, packing_model_type="qwen3")
    assert sum(len(rows) for rows in data.train) == 64
    assert data.report.train.fill == int(data.train.lengths.sum()) / (len(data.train) * 64)


def test_what_was_done_about_packing_is_said(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    packed = run(config, tokenizer, packing_model_type="qwen3")
    assert packed.report.notes() == [f"32 rows are packed into {len(packed.train)} sequences, 80% full"]
    alone = run(config, tokenizer, packing_model_type="strange")
    assert alone.report.notes() == ["rows are not packed: model type strange was never shown to keep packed rows apart"]
    config.packing = False
    assert run(config, tokenizer, packing_model_type="strange").report.notes() == []


def test_an_empty_place_of_validation_rows_is_none(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.val_path = None
    split = run(config, tokenizer)
    config.val_path = ""
    assert len(split.val) and run(config, tokenizer).val.digests.tolist() == split.val.digests.tolist()


def test_the_seed_of_the_split_may_be_its_own(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.split_seed = 1
    one, other = (texts(run(config, tokenizer, seed=seed).val, tokenizer) for seed in (2, 3))
    config.split_seed = None
    assert one == other == texts(run(config, tokenizer, seed=1).val, tokenizer)


def test_rows_that_repeat_others_are_counted_in_training_and_across_the_split(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    assert (run(config, tokenizer).report.train.duplicates, run(config, tokenizer).report.leaked) == (0, 0)
    config.path = write_rows(pair(1), pair(1, "b"), pair(1), pair(2), pair(3), name="train.jsonl")
    config.val_path = write_rows(pair(2), pair(2), pair(9), name="val.jsonl")
    report = run(config, tokenizer).report
    assert (report.train.duplicates, report.leaked) == (2, 2)
    assert "2 of 5 training rows repeat the tokens of another one" in report.notes()
    assert any(note.startswith("2 of 3 validation rows are training rows too") for note in report.notes())
    config.val_path = config.path
    assert run(config, tokenizer).report.leaked == 5


def test_the_notes_name_what_is_ignored_left_out_and_not_read(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any, tmp_path: Path
) -> None:
    rows = [pair(1) | {"id": 1, "source": "x"}, pair(2) | {"id": 2}, {"q": "x"}, pair(3)]
    write_rows(*rows, name="rows/a.jsonl")
    (tmp_path / "rows" / "b.md").write_text("x")
    config.path, config.on_bad_row = str(tmp_path / "rows"), OnBadRow.drop
    for _ in range(2):  # the second time from the cache
        bad, ignored, unread = run(config, tokenizer).report.notes()
        assert bad.startswith(f"{tmp_path}/rows: 1 of 4 rows cannot be used and are left out: ")
        assert f"{tmp_path}/rows/a.jsonl:3: unknown row format with keys ['q']" in bad
        assert ignored == f"{tmp_path}/rows: fields that are ignored: id, source"
        assert unread == f"{tmp_path}/rows: files that are not read: b.md"
    assert run(config, tokenizer).report.train.rows_by_domain == {"all": 2}


def test_a_long_list_of_ignored_fields_is_shortened(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.path = write_rows(*(pair(n) | {"": 1, "a" * 5000: 1} | {f"k{k}": 1 for k in range(30)} for n in range(3)))
    [note] = run(config, tokenizer).report.notes()
    assert 'fields that are ignored: "", aaa' in note and note.endswith(" and 22 more") and len(note) < 500


# --- the rows of some domains


@pytest.mark.parametrize("with_val", [False, True])
def test_chosen_domains_alone_are_used_with_the_rows_and_the_cache_of_a_run_of_all(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any, with_val: bool
) -> None:
    if with_val:
        config.val_path = write_rows(pair(1, "a"), pair(2, "math"), pair(3, "code"), name="val.jsonl")
    everything = run(config, tokenizer)
    config.domains = ["math"]
    data = run(config, tokenizer)
    assert (
        all(hits(data)) and data.domains == ["math"] and data.report.train.rows_by_domain == {"math": len(data.train)}
    )
    for some, whole in ((data.train, everything.train), (data.val, everything.val)):
        names = [everything.domains[d] for d in whole.domains.tolist()]
        expected = [row.input_ids.tolist() for row, name in zip(whole, names, strict=True) if name == "math"]
        assert [row.input_ids.tolist() for row in some] == expected and expected
        assert set(some.domains.tolist()) == {0}
    [note] = [note for note in data.report.notes() if "data.domains" in note]
    gone = len(everything.train) - len(data.train), len(everything.val) - len(data.val)
    others = "a, code" if with_val else "code"
    assert note == (
        f"data.domains leaves out {gone[0]} training and {gone[1]} validation rows of other domains: {others}"
    )


def test_the_order_in_which_domains_are_named_changes_nothing(
    two: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = run(two, tokenizer)
    assert plain.report.left_out is None
    two.domains = plain.domains[::-1]
    data = run(two, tokenizer)
    assert data.domains == plain.domains and counts(data) == counts(plain)
    assert data.train.domains.equal(plain.train.domains) and data.train.digests.equal(plain.train.digests)


@pytest.mark.parametrize("mixing", [{"temperature": 2.0}, {"sources": "weighted"}])
def test_mixtures_are_made_of_the_chosen_domains_alone(
    two: DataConfig, tokenizer: PreTrainedTokenizerFast, mixing: dict[str, Any]
) -> None:
    two.domains = ["little"]
    if "temperature" in mixing:
        two.temperature = mixing["temperature"]
    else:
        two.sources["a"].weight = two.sources["b"].weight = 1.0
    data = run(two, tokenizer)
    assert data.report.mixed is not None and data.report.mixed.rows_by_domain == {"little": 8}


def test_a_choice_of_domains_that_leaves_nothing_says_what_there_is(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.domains = ["math", "law"]
    with pytest.raises(
        DataError, match=r"data\.domains names law, of which there is no row; the rows are of code, math"
    ):
        run(config, tokenizer)
    config.val_path = write_rows(pair(1, "law"), name="val.jsonl")
    config.domains = ["law"]
    with pytest.raises(DataError, match=r"data\.domains=law: all rows of these domains are validation rows"):
        run(config, tokenizer)
    config.domains = ["math"]
    with pytest.raises(DataError, match=r"no validation row is of these domains; add some to data\.val_path"):
        run(config, tokenizer)
    config.path, config.val_path = write_rows(*(pair(n) for n in range(9)), pair(1, "math"), name="few.jsonl"), None
    with pytest.raises(DataError, match=r"no validation row is of these domains; raise data\.val_fraction, or set"):
        run(config, tokenizer)


# --- domains that say nothing


def test_domains_are_dealt_anew_among_the_same_rows_of_each_split(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    config.temperature = 2.0
    plain = run(config, tokenizer)
    assert not any("permute" in note for note in plain.report.notes())
    config.permute_domains = True
    data, again = run(config, tokenizer), run(config, tokenizer)
    for new, old, repeated in ((data.train, plain.train, again.train), (data.val, plain.val, again.val)):
        assert new.digests.equal(old.digests) and hits(data) == [True]
        assert new.domains.bincount().equal(old.domains.bincount()) and not new.domains.equal(old.domains)
        assert new.domains.equal(repeated.domains)
    assert data.domains == plain.domains
    [note] = [note for note in data.report.notes() if "permute" in note]
    assert "domains were dealt anew among the rows (data.permute_domains)" in note


def test_a_row_that_comes_again_in_a_mixture_has_one_false_domain(
    two: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    two.sources["a"].weight, two.sources["b"].weight, two.permute_domains = 1.0, 3.0, True
    train = run(two, tokenizer).train
    pairs = {*zip(train.digests.tolist(), train.domains.tolist(), strict=True)}
    assert len(pairs) == len(train.digests.unique()) < len(train)


def test_one_domain_cannot_be_dealt_anew(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.permute_domains, config.domains = True, ["math"]
    with pytest.raises(DataError, match=r"data\.permute_domains=true: all training rows are of the domain math, so"):
        run(config, tokenizer)


# --- a text before prompts


def test_a_prefix_no_row_has_a_place_for_is_refused_and_rows_without_one_are_counted(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    config.prompt_prefix = "[{domain}] "
    data = run(config, tokenizer)
    assert all(f"user\n[{data.domains[row.domain]}] What is" in tokenizer.decode(row.input_ids) for row in data.train)
    assert not any("prompt_prefix" in note for note in data.report.notes())
    config.path = write_rows(pair(1), {"text": "four"}, pair(2), name="mixed.jsonl")
    for _ in range(2):  # also from the cache
        data = run(config, tokenizer)
        [note] = [note for note in data.report.notes() if "prompt_prefix" in note]
        assert "1 of 3 rows have no message of the user, so data.prompt_prefix is not put before them" in note
    config.path = write_rows({"text": "four"}, {"text": "five"}, name="texts.jsonl")
    with pytest.raises(DataError, match=r"data\.prompt_prefix has no effect: no row has a message of the user"):
        run(config, tokenizer)
    config.prompt_prefix = None
    assert not any("prompt_prefix" in note for note in run(config, tokenizer).report.notes())
