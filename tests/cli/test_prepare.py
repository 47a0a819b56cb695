"""`lmoe prepare`: lengths, domains, what was dropped, and where the cache is."""

import json

import pytest
from typer.testing import CliRunner

from lmoe.cli.main import app
from tests.report.html_page import ParsedPage


@pytest.fixture
def prepare(restored, micro, tmp_path):
    def command(data: str, *arguments: str):
        place = ["--model", str(micro.model), "--cache-dir", str(tmp_path / "cache")]
        done = CliRunner().invoke(app, ["prepare", "--data", data, *place, *arguments], env={"COLUMNS": "200"})
        return done.exit_code, " ".join(done.output.split())

    return command


def test_brackets_in_the_name_of_a_domain_stay_brackets(prepare, tmp_path):
    row = {"prompt": "say red", "completion": "red", "domain": "[red]code"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"prompt": f"say {n}"}) + "\n" for n in range(40)))
    code, said = prepare(str(tmp_path / "rows.jsonl"), "--max-length", "48")
    assert code == 0, said
    assert "rows of [red]code" in said


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
    assert "% full" in said and "packing: off" not in said
    said = said.replace("cache miss", "cache hit")
    assert prepare(str(micro.train), "--max-length", "128") == (0, said)
    code, said = prepare(str(micro.train), "--no-packing", "--max-length", "128")
    assert code == 0 and "packing: off; data.packing=true would make" in said


def test_it_prints_the_share_of_labels_and_the_duplicates(prepare, tmp_path):
    rows = tmp_path / "rows.jsonl"
    records = [{"text": word} for word in ("red blue", "red blue", "red blue", "red green")]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    code, said = prepare(str(rows), "--val", str(rows))
    assert code == 0, said
    cells = [cell.strip() for cell in said.split("│")]
    assert cells[cells.index("duplicate rows") + 1 :][:2] == ["2", "2"]
    tokens, labels = (int(cells[cells.index(name) + 1].split(" ")[0]) for name in ("tokens", "label tokens"))
    assert cells[cells.index("label tokens") + 1] == f"{labels} ({labels / tokens:.1%})" and labels == tokens - 4


def test_rows_are_shown_as_training_sees_them(prepare, micro):
    code, said = prepare(str(micro.train), "--show", "2", "--max-length", "24")
    assert code == 0, said
    for domain in ("code", "math", "words"):
        assert all(f"{micro.train}/{domain}.jsonl:{line}: domain {domain};" in said for line in (1, 2))
        assert f"{domain}.jsonl:3:" not in said
    assert "⟦red<|im_end|>⟧↵" in said and "cut here, behind 24 tokens" in said
    assert said.index("⟦red") < said.index("label tokens")
    assert "⟦" not in prepare(str(micro.train))[1]


def test_rows_are_shown_on_a_page_and_no_other_file_is_written_over(prepare, micro, tmp_path):
    page = tmp_path / "page.html"
    code, said = prepare(str(micro.train), "--show", "1", "--output", str(page))
    assert code == 0 and f"3 rows as training sees them: {page}" in said and "⟦" not in said
    assert ParsedPage(page.read_text(encoding="utf-8")).tags.count("article") == 3
    assert prepare(str(micro.train), "--show", "2", "--output", str(page))[0] == 0
    assert ParsedPage(page.read_text(encoding="utf-8")).tags.count("article") == 6
    page.write_text("mine")
    code, said = prepare(str(micro.train), "--show", "1", "--output", str(page))
    assert code == 1 and said == f"--output {page} exists and is no page of lmoe; name another file"
    assert page.read_text() == "mine"


def test_a_page_needs_rows_to_show_a_name_and_a_folder(prepare, micro, tmp_path):
    code, said = prepare(str(micro.train), "--output", str(tmp_path / "page.html"))
    assert code == 1 and "--output has no effect without --show N" in said
    code, said = prepare(str(micro.train), "--show", "1", "--output", str(tmp_path / "page.txt"))
    assert code == 1 and "name a file that ends in .html" in said
    code, said = prepare(str(micro.train), "--show", "1", "--output", str(tmp_path / "nowhere" / "page.html"))
    assert code == 1 and said.count("there is no folder") == 1 and "Traceback" not in said
    assert not list(tmp_path.glob("**/*.html")) and not (tmp_path / "nowhere").exists()


def test_a_row_that_is_refused_is_shown_before_the_command_ends_with_its_error(prepare, micro, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('not this one') }}")
    code, said = prepare(str(micro.train), "--show", "1", "--chat-template", str(template))
    assert code == 1
    assert f"{micro.train}/math.jsonl:1: domain math; refused: the chat template refuses" in said


def test_what_is_shown_of_a_refused_row_advises_what_can_be_written_here(prepare, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n')
    _, said = prepare(str(rows), "--show", "1")
    shown = said.split("refused: ")[1].splitlines()[0]
    assert "--columns response=answer learns it" in shown and "data.columns" not in said


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


def test_pairs_are_counted_with_what_is_dropped_and_cut_and_both_answers_are_shown(prepare, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    pairs = [("a", "red", "blue"), ("b", "green", "river " * 40), ("c", "red", ""), ("d", "tree", "a bird")]
    records = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    code, said = prepare(str(rows), "--val", str(rows), "--task", "dpo", "--show", "3", "--max-length", "48")
    assert code == 0, said
    assert "4 rows read, 3 kept, 1 cut to length; 1 dropped: no assistant text" in said
    cells = [cell.strip() for cell in said.split("│")]
    assert cells[cells.index("pairs of answers") + 1 :][:2] == ["3", "3"]
    assert cells[cells.index("length, max") + 1] == "48", "of a sequence, and not of both answers together"
    for line, answers in ((1, ("⟦red<|im_end|>⟧", "⟦blue<|im_end|>⟧")), (3, ())):
        for name in ("chosen", "rejected"):
            assert f"{rows}:{line}: domain all; {name} answer; " in said
        assert all(answer in said for answer in answers)
    assert said.count("⟦") == 1 + 4 and "packing" not in said
    code, said = prepare(str(rows), "--val", str(rows), "--task", "kto")
    assert code == 0 and "8 rows read, 7 kept" in said
    cells = [cell.strip() for cell in said.split("│")]
    assert cells[cells.index("bad answers") + 1] == "3"
    page = tmp_path / "page.html"
    assert (
        f"2 rows as training sees them: {page}"
        in prepare(str(rows), "--task", "dpo", "--show", "2", "--output", str(page), "--val", str(rows))[1]
    )
    assert ParsedPage(page.read_text(encoding="utf-8")).tags.count("article") == 4


def test_rows_that_a_run_would_refuse_together_are_named(prepare, tmp_path):
    rows = tmp_path / "good.jsonl"
    records = [{"prompt": f"say {n}", "completion": "red", "label": True} for n in range(6)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    code, said = prepare(str(rows), "--task", "kto")
    assert code == 0, said
    assert (
        "note: a run would refuse this: --data: all 5 rows to train on are good answers, and --task kto learns" in said
    )
    rows.write_text(rows.read_text() + json.dumps(records[0] | {"label": False}) + "\n", encoding="utf-8")
    assert "a run would refuse" not in prepare(str(rows), "--val", str(rows), "--task", "kto")[1]


def test_what_no_row_of_a_task_can_be_is_named_by_flags(prepare, micro, tmp_path):
    code, said = prepare(str(micro.train), "--task", "dpo", "--packing", "--train-on", "all")
    assert code == 1 and "--packing true: --task dpo keeps the sequences of its rows apart" in said
    assert "--train-on all: --task dpo compares answers" in said
    code, said = prepare(str(micro.train), "--task", "orpo")
    assert code == 1 and "it is no pair of answers, and --task dpo, orpo, simpo, reward learns from pairs" in said
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    code, said = prepare(str(rows))
    assert code == 1 and "which --task sft does not do (dpo, orpo, simpo, reward do); --columns response=chosen" in said
