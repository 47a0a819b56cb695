"""The loss of each row: it adds up to that of its domain, has a name of its own, and comes back from its file."""

from dataclasses import replace
from pathlib import Path

import pytest

import lmoe
from lmoe.config.data import DataConfig
from lmoe.errors import CheckpointError, DataError
from lmoe.evaluate.loss_rows import prepare_judging
from lmoe.evaluate.losses import domain_losses
from lmoe.evaluate.row_losses import read_row_losses, row_losses, write_row_losses
from lmoe.evaluate.subject import Subject
from tests.micro import DOMAINS


@pytest.fixture(scope="module")
def subject(finished_run) -> Subject:
    model, tokenizer = lmoe.load(finished_run)
    return Subject(model=model, tokenizer=tokenizer, batch_size=4, max_length=48)


def judging(subject, micro, **settings):
    given = {"path": str(micro.train), "judge_path": str(micro.val), "cache_dir": str(micro.cache), "max_length": 48}
    config = DataConfig(packing=False, **(given | settings))
    return prepare_judging(config, subject.tokenizer, seed=0, bundled=Path("none"), length_name="data.max_length")


@pytest.fixture(scope="module")
def found(subject, micro):
    return row_losses(subject, judging(subject, micro))


def test_the_losses_of_the_rows_add_up_to_that_of_their_domain(subject, micro, found):
    by_domain = {row.domain: row for row in domain_losses(subject, judging(subject, micro))}
    assert {row.domain for row in found} == set(DOMAINS)
    for domain in DOMAINS:
        own = [row for row in found if row.domain == domain]
        tokens = sum(row.label_tokens for row in own)
        assert tokens == by_domain[domain].label_tokens
        assert sum(row.loss for row in own) / tokens == pytest.approx(by_domain[domain].on_loss, rel=1e-12)


def test_a_row_has_its_losses_whatever_the_batch(subject, micro, found):
    alone = row_losses(replace(subject, batch_size=1), judging(subject, micro))
    assert [row.row for row in alone] == [row.row for row in found]
    assert [row.loss for row in alone] == pytest.approx([row.loss for row in found], rel=1e-5)


def test_names_are_of_the_row_and_not_of_its_place_or_tokens(subject, micro, found, tmp_path):
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for file in micro.val.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    again = judging(subject, micro, judge_path=str(copied), max_length=40).row_ids()
    assert again == [row.row for row in found] and len(set(again)) == len(again)
    (file,) = [file for file in copied.iterdir() if file.stem == DOMAINS[0]]
    lines = file.read_text("utf-8").splitlines()
    file.write_text("\n".join(lines[1:]) + "\n", "utf-8")
    assert not set(judging(subject, micro, judge_path=str(copied)).row_ids()) & set(again)


def test_a_file_comes_back_with_all_its_digits(found, tmp_path):
    write_row_losses(found, tmp_path / "rows.csv")
    assert read_row_losses(tmp_path / "rows.csv") == found


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("row,", "rows,", 1), "does not begin with row,domain"),
        (lambda text: text + "x,y\n", ":"),
        (lambda text: text.splitlines()[0] + "\n", "no rows"),
        (lambda text: text.splitlines()[0] + "\na,b,c,1,nan\n", "finite"),
    ],
)
def test_a_damaged_file_is_refused_by_name(found, tmp_path, damage, said):
    file = tmp_path / "rows.csv"
    write_row_losses(found, file)
    file.write_text(damage(file.read_text("utf-8")), "utf-8")
    with pytest.raises(CheckpointError, match=f"rows.csv.*{said}"):
        read_row_losses(file)


def test_a_share_is_split_off_and_its_rows_are_in_no_other_part(subject, micro):
    from lmoe.data.prepare import prepare

    settings = {"judge_path": None, "judge_fraction": 0.3}
    share = judging(subject, micro, **settings)
    config = DataConfig(path=str(micro.train), judge_fraction=0.3, cache_dir=str(micro.cache), max_length=48)
    rest = prepare(
        replace(config, packing=False), subject.tokenizer, seed=0, bundled=Path("none"), packing_model_type=None
    )
    whole = prepare(
        replace(config, packing=False, judge_fraction=0.0),
        subject.tokenizer,
        seed=0,
        bundled=Path("none"),
        packing_model_type=None,
    )
    parts = [set(rows.digests.tolist()) for rows in (share.rows, rest.train, rest.val)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2])
    assert len(share.rows) + len(rest.train) + len(rest.val) <= len(whole.train) + len(whole.val)
    assert set.union(*parts) == set(whole.train.digests.tolist()) | set(whole.val.digests.tolist())


def test_rows_that_nobody_keeps_for_judging_cannot_be_had(subject, micro):
    with pytest.raises(DataError, match=r"data\.judge_path.*data\.judge_fraction"):
        judging(subject, micro, judge_path=None)


def test_the_bundled_rows_have_judging_rows_of_their_own(subject):
    from lmoe.files.resources import resource_dir

    config = DataConfig(max_length=384, packing=False)
    data = prepare_judging(
        config, subject.tokenizer, seed=0, bundled=resource_dir("data"), length_name="data.max_length"
    )
    files = sorted((resource_dir("data/sft") / "judge").glob("*.jsonl"))
    assert sorted(data.domains) == [file.stem for file in files] and len(files) == 8
    assert len(data.rows) <= sum(len(file.read_text("utf-8").splitlines()) for file in files)
