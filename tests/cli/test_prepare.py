"""`lmoe prepare`: lengths, domains, what was dropped, and where the cache is."""

import json

import pytest
from typer.testing import CliRunner

from lmoe.cli.main import app


@pytest.fixture
def prepare(restored, micro, tmp_path):
    def command(data: str, *arguments: str):
        place = ["--model", str(micro.model), "--cache-dir", str(tmp_path / "cache")]
        done = CliRunner().invoke(app, ["prepare", "--data", data, *place, *arguments], env={"COLUMNS": "200"})
        return done.exit_code, " ".join(done.output.split())

    return command


def test_it_prints_lengths_domains_and_the_cache_and_hits_it_the_second_time(prepare, micro):
    code, said = prepare(str(micro.train), "--val", str(micro.val), "--max-length", "48")
    assert code == 0, said
    for words in ("rows of code", "rows of math", "rows of words", "length, 90 %", "label tokens", "30 rows read"):
        assert words in said
    assert "cache miss" in said
    assert "cache hit" in prepare(str(micro.train), "--val", str(micro.val), "--max-length", "48")[1]
    assert "cache miss" in prepare(str(micro.train), "--val", str(micro.val), "--max-length", "40")[1]


def test_it_counts_what_was_dropped(prepare, tmp_path):
    rows = tmp_path / "rows.jsonl"
    records = [{"prompt": "a", "response": answer} for answer in ("blue", "", "red", "green")]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    code, said = prepare(str(rows))
    assert code == 0, said
    assert "4 rows read, 3 kept" in said
    assert "1 dropped: no assistant text" in said


def test_packing_tells_how_full_the_sequences_are(prepare, micro):
    code, said = prepare(str(micro.train), "--packing", "--max-length", "128")
    assert code == 0, said
    assert "packed sequences" in said
    assert "% full" in said


@pytest.mark.parametrize(
    ("line", "said"), [('{"prompt": ', "malformed JSON"), ('{"question": 1}', "unknown row format"), ("[]", "object")]
)
def test_a_bad_row_is_named_with_file_and_line(prepare, tmp_path, line, said):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    code, text = prepare(str(rows))
    assert code == 1
    assert f"{rows}:2" in text
    assert said in text
    assert "Traceback" not in text


def test_a_model_that_is_none_is_named(prepare, micro):
    code, text = prepare(str(micro.train), "--model", "/nowhere/model")
    assert code == 1
    assert "no such model directory" in text
