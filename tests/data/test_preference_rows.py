"""The bundled pairs of answers: what data/README.md says of them, and how the script chooses them."""

import gzip
import json
import random
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.micro import ROOT

SPLITS = ("train", "val", "judge")
DOMAINS = ("general", "math", "math_corrupted", "sql_corrupted")
Row = dict[str, str]


def rows_of(folder: Path, split: str, domain: str) -> list[Row]:
    return [json.loads(line) for line in (folder / split / f"{domain}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def bundled() -> dict[tuple[str, str], list[Row]]:
    return {
        (split, domain): rows_of(ROOT / "data" / "preference", split, domain) for split in SPLITS for domain in DOMAINS
    }


def test_the_bundled_pairs_are_small_and_of_four_domains():
    files = sorted((ROOT / "data" / "preference").rglob("*.jsonl"))
    assert {(file.parent.name, file.stem) for file in files} == {(split, name) for split in SPLITS for name in DOMAINS}
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_a_bundled_pair_is_two_different_answers_as_plain_text(bundled):
    for (_, domain), rows in bundled.items():
        for row in rows:
            assert list(row) == ["prompt", "chosen", "rejected", "domain", "source"]
            assert row["domain"] == domain and row["chosen"] != row["rejected"]
            assert all(text == text.strip() and text for text in row.values())


def test_no_prompt_of_a_pair_is_in_two_splits(bundled):
    prompts = {split: {row["prompt"] for name in DOMAINS for row in bundled[split, name]} for split in SPLITS}
    assert all(len(found) > 200 for found in prompts.values())
    for one, other in (("train", "val"), ("train", "judge"), ("val", "judge")):
        assert not prompts[one] & prompts[other]


def test_at_most_two_pairs_share_a_prompt(bundled):
    for rows in bundled.values():
        prompts = [row["prompt"] for row in rows]
        assert max(map(prompts.count, prompts)) <= 2
        assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == len(rows)


def test_written_solutions_answer_problems_that_no_instruction_row_has(bundled):
    folder = ROOT / "data" / "sft"
    learnt = {row["messages"][0]["content"] for split in SPLITS for row in rows_of(folder, split, "math")}
    assert len(learnt) == 1350
    assert not learnt & {row["prompt"] for split in SPLITS for row in bundled[split, "math"]}


@pytest.mark.parametrize("name", ["math", "sql"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_corrupted_pair_is_made_of_an_instruction_row_of_the_same_split(bundled, split, name):
    given = {
        (row["messages"][0]["content"], row["messages"][1]["content"], row["source"])
        for row in rows_of(ROOT / "data" / "sft", split, name)
    }
    for row in bundled[split, f"{name}_corrupted"]:
        assert (row["prompt"], row["chosen"], row["source"]) in given


def test_the_page_of_the_data_has_the_counts_the_measured_lengths_and_the_sources(bundled):
    page = (ROOT / "data" / "README.md").read_text("utf-8")
    for domain in DOMAINS:
        train, val, judge = (len(bundled[split, domain]) for split in SPLITS)
        held_out = bundled["val", domain] + bundled["judge", domain]
        shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in held_out) / len(held_out)
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in held_out) / len(held_out)
        assert f"| `{domain}` | {train} | {val} | {judge} | {shorter:.0%} | {longer:.0%} |".replace("%", " %") in page
    licensed = set(re.findall(r"^\| \w+ \| `([\w/.-]+)` \| [0-9a-f]{12} \|", page, flags=re.MULTILINE))
    assert {row["source"].split(":")[0] for rows in bundled.values() for row in rows} <= licensed


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", ["math_corrupted", "sql_corrupted"])
def test_a_corrupted_answer_is_longer_as_often_as_it_is_shorter(bundled, split, domain):
    rows = bundled[split, domain]
    longer = sum(len(row["rejected"]) > len(row["chosen"]) for row in rows)
    shorter = sum(len(row["rejected"]) < len(row["chosen"]) for row in rows)
    assert abs(longer - shorter) <= 1
    assert sum(len(row["rejected"]) - len(row["chosen"]) for row in rows) / len(rows) == pytest.approx(0, abs=1)


def test_a_wrong_last_number_is_larger_as_often_as_it_is_smaller(bundled, last_number):
    for split in SPLITS:
        pairs = [(last_number(row["chosen"]), last_number(row["rejected"])) for row in bundled[split, "math_corrupted"]]
        assert all(right != wrong for right, wrong in pairs)
        assert abs(sum((wrong > right) - (wrong < right) for right, wrong in pairs)) <= 1


def test_a_wrong_query_compares_with_no_text_that_its_question_lacks(bundled):
    found = 0
    for split in SPLITS:
        for row in bundled[split, "sql_corrupted"]:
            texts = re.findall(r'"([^"]*)"', row["rejected"])
            found += len(texts)
            assert all(text.lower() in row["prompt"].lower() for text in texts)
    assert found > 300


@pytest.fixture
def last_number() -> Callable[[str], int]:
    return runpy.run_path(str(ROOT / "data" / "corrupt_math.py"))["last_number"]


def a_pair(number: int, answer: str = "") -> Row:
    prompt = f"What is {number // 3} and {number // 3}?"
    return {"prompt": prompt, "chosen": f"It is {number}.", "rejected": f" {answer or number + 1}\n", "source": "a:b"}


@pytest.fixture
def small(tmp_path: Path, bundled) -> tuple[Path, Path]:
    """A small collection of pairs, and the instructions of some bundled pairs."""
    collection, sft = tmp_path / "collection", tmp_path / "sft"
    collection.mkdir()
    for domain in ("math", "general"):
        lines = [json.dumps(a_pair(number)) for number in range(60)] + [json.dumps(a_pair(3, "It is 3."))]
        (collection / f"{domain}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        lines = [json.dumps(a_pair(number)) for number in range(300, 312)]
        (collection / f"{domain}.test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for split in SPLITS:
        for name in ("math", "sql"):
            rows = [
                {"messages": [{"content": row["prompt"]}, {"content": row["chosen"]}], "source": row["source"]}
                for row in bundled[split, f"{name}_corrupted"][:12]
            ]
            (sft / split).mkdir(parents=True, exist_ok=True)
            (sft / split / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return collection, sft


def select(small: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[Row]]:
    collection, sft = small
    script = str(ROOT / "data" / "select_preference.py")
    counts = ("--train", "8", "--val", "4", "--judge", "6")
    call = [script, "--source", str(collection), "--sft", str(sft), "--out", str(out), *counts]
    monkeypatch.setattr(sys, "argv", call)
    monkeypatch.syspath_prepend(ROOT / "data")
    runpy.run_path(script, run_name="__main__")
    return {(split, domain): rows_of(out, split, domain) for split in SPLITS for domain in DOMAINS}


def test_the_same_rows_in_another_order_give_the_same_pairs(small, tmp_path, monkeypatch):
    first = select(small, tmp_path / "one", monkeypatch)
    for file in [*small[0].glob("*.jsonl"), *small[1].rglob("*.jsonl")]:
        lines = file.read_text("utf-8").splitlines()
        random.Random(0).shuffle(lines)
        file.write_text("\n".join(lines), encoding="utf-8")
    for file in small[0].glob("*.gz"):
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        file.write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))
    assert select(small, tmp_path / "two", monkeypatch) == first
    assert [len(first[split, "math"]) for split in SPLITS] == [8, 4, 6]
    assert all(4 <= len(rows) <= 8 for rows in first.values())


def test_held_out_prompts_are_never_trained_on_and_equal_answers_are_left_out(small, tmp_path, monkeypatch):
    found = select(small, tmp_path / "out", monkeypatch)
    held_out = {json.loads(line)["prompt"] for line in (small[0] / "math.test.jsonl").read_text().splitlines()}
    prompts = {split: {row["prompt"] for row in found[split, "math"]} for split in SPLITS}
    assert prompts["judge"] <= held_out and not prompts["train"] & held_out
    assert not prompts["train"] & prompts["val"] and not prompts["val"] & prompts["judge"]
    assert all(row["chosen"] != row["rejected"].strip() for rows in found.values() for row in rows)


def test_a_prompt_in_both_files_of_the_collection_is_refused(small, tmp_path, monkeypatch):
    file = small[0] / "math.test.jsonl"
    file.write_text(file.read_text("utf-8") + "\n" + json.dumps(a_pair(4)), encoding="utf-8")
    with pytest.raises(SystemExit, match="math: 1 held-out prompts are among the others, such as 'What is 1 and 1"):
        select(small, tmp_path / "out", monkeypatch)
