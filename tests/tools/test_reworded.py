"""The bundled rows in other words (tools/reworded.py), and what their mere words tell (benchmarks/prompt_words.py)."""

import json

import pytest

from benchmarks.prompt_words import accuracy
from lmoe.files.resources import resource_dir
from tools.reworded import FRAMES, PHRASES, reworded, rows_of, write

BUNDLED = resource_dir("data/sft")
IN_FRAMES = {"code", "dialogue", "sql", "translation"}


@pytest.mark.parametrize("kind", ["varied", "dropped"])
@pytest.mark.parametrize("domain", sorted(IN_FRAMES))
def test_nearly_every_prompt_of_a_domain_with_a_fixed_sentence_changes_and_its_answer_never(domain, kind):
    rows = list(rows_of(BUNDLED / "val" / f"{domain}.jsonl"))
    changed = [reworded(row, "val", kind) for row in rows]
    assert sum(new != old for new, old in zip(changed, rows, strict=True)) >= 0.98 * len(rows)
    for new, old in zip(changed, rows, strict=True):
        assert new["messages"][1:] == old["messages"][1:]
        assert new["messages"][0]["content"].strip()


def test_no_wording_of_judging_rows_is_one_of_training_rows():
    for wordings in (*FRAMES, *PHRASES):
        assert wordings.judged and not set(wordings.judged) & set(wordings.taught)


def test_a_wording_keeps_every_part_of_what_is_asked():
    for frame in FRAMES:
        parts = set(frame.pattern.groupindex)
        for wording in (*frame.taught, *frame.judged):
            assert {part for part in parts if f"{{{part}}}" in wording} == parts, wording


def test_a_row_without_a_fixed_sentence_stays_as_it_is():
    row = next(rows_of(BUNDLED / "val" / "math.jsonl"))
    assert reworded(row, "train", "varied") == reworded(row, "judge", "dropped") == row


def test_all_splits_are_written_with_as_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.reworded.BUNDLED", tmp_path / "rows")
    for split in ("train", "val", "judge"):
        (tmp_path / "rows" / split).mkdir(parents=True)
        rows = [
            {"messages": [{"role": "user", "content": f"Translate to English: {word}"}], "domain": "translation"}
            for word in ("hej", "tack")
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows" / split / "translation.jsonl").write_text(text)
    assert write("dropped", tmp_path / "out") == {f"{s}/translation": 2 for s in ("train", "val", "judge")}
    written = [row["messages"][0]["content"] for row in rows_of(tmp_path / "out" / "judge" / "translation.jsonl")]
    assert written == ["hej", "tack"]


def test_words_that_only_one_domain_has_tell_it_and_words_that_all_have_do_not(tmp_path):
    texts = {"a": "red apple", "b": "green pear"}
    for folder, of in (("told", lambda name: texts[name]), ("not", lambda name: "the same words")):
        for split in ("train", "judge"):
            (tmp_path / folder / split).mkdir(parents=True)
            for name in texts:
                row = {"messages": [{"role": "user", "content": of(name)}], "domain": name}
                (tmp_path / folder / split / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    assert accuracy(tmp_path / "told")["all"] == 1
    assert accuracy(tmp_path / "not")["all"] == 0.5
