"""`lmoe evaluate`: files, tables and W&B, and one clear message for whatever cannot be measured."""

import csv
import json

import pytest
from typer.testing import CliRunner

from lmoe.cli.main import app
from tests.micro import DOMAINS
from tests.pair_rows import write_pairs
from tests.wandb_file import history, run_files

QUIZ = (
    '{"question": "say red", "choices": ["red", "green blue"], "answer": 0}\n'
    '{"question": "say fish", "choices": ["a river", "fish"], "answer": 1}\n'
)


@pytest.fixture
def evaluate(restored, finished_run, tmp_path):
    (tmp_path / "quiz.jsonl").write_text(QUIZ, encoding="utf-8")

    def command(*arguments: str, checkpoint: str | None = None, output: str | None = "out"):
        place = str(finished_run) if checkpoint is None else checkpoint
        folder = () if output is None else ("--output", output)
        return CliRunner().invoke(app, ["evaluate", "--checkpoint", place, *folder, *arguments])

    return command


def test_everything_is_in_json_in_csv_and_on_the_terminal(evaluate, tmp_path):
    done = evaluate("--choices", "quiz.jsonl", "--samples", "2", "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert [row["domain"] for row in found["losses"]] == [*DOMAINS, "(all tokens)", "(domain mean)"]
    assert [row["task"] for row in found["choices"]] == ["quiz"]
    assert [row["domain"] for row in found["samples"]] == sorted([*DOMAINS, *DOMAINS])
    assert found["samples"][0]["prompt"].startswith("<|im_start|>user\ncode 100: say ")
    assert found["settings"]["max_length"] == 48
    for part in ("losses", "choices", "samples"):
        with (tmp_path / "out" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [{key: str(value) for key, value in row.items()} for row in found[part]] == rows
    for shown in (*DOMAINS, "adapters on", "quiz", "±", "random", "In out: evaluation.json, losses.csv"):
        assert shown in done.stdout


def test_the_same_command_writes_the_same_bytes_and_takes_away_what_it_did_not_measure(evaluate, tmp_path):
    whole = ("--choices", "quiz.jsonl", "--samples", "1", "--max-new-tokens", "4")
    assert evaluate(*whole).exit_code == 0
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert sorted(first) == ["choices.csv", "evaluation.json", "losses.csv", "samples.csv"]
    assert evaluate(*whole).exit_code == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == first
    assert evaluate("--data", "none", "--choices", "quiz.jsonl").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["choices.csv", "evaluation.json"]


def test_a_run_keeps_its_evaluation_and_an_adapter_alone_takes_other_rows(evaluate, own_run, micro, tmp_path):
    assert evaluate("--limit", "1", checkpoint=str(own_run), output=None).exit_code == 0
    own = json.loads((own_run / "evaluation" / "evaluation.json").read_text("utf-8"))
    assert own["settings"]["data"] == f"the validation rows of {own_run}"
    alone = (own_run / "adapter").rename(tmp_path / "alone")
    done = evaluate(
        *("--data", str(micro.val), "--limit", "1", "--max-length", "48"), checkpoint=str(alone), output=None
    )
    assert done.exit_code == 0, done.output
    other = json.loads((alone / "evaluation" / "evaluation.json").read_text("utf-8"))
    assert other["losses"] == own["losses"]


def test_the_bundled_rows_are_at_hand(evaluate, tmp_path):
    done = evaluate("--data", "bundled", "--limit", "1", "--choices", "bundled", "--max-length", "128")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert len(found["losses"]) == 10
    assert [row["task"] for row in found["choices"]] == ["arc_easy", "boolq", "openbookqa", "piqa", "winogrande"]


def test_wandb_gets_tables_and_numbers_offline(evaluate, tmp_path):
    done = evaluate("--choices", "quiz.jsonl", "--limit", "1", "--wandb")
    assert done.exit_code == 0, done.output
    assert "wandb sync" in done.stdout
    (file,) = run_files(tmp_path / "out")
    (row,) = history(file)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert row["eval/code/loss"] == pytest.approx(found["losses"][0]["on_loss"])
    assert row["eval/quiz/accuracy_off"] == found["choices"][0]["off_normalised"]
    (table,) = (tmp_path / "out").rglob("media/table/evaluation/losses*.json")
    assert json.loads(table.read_text("utf-8"))["data"][0][0] == "code"


def test_preferences_are_in_json_in_csv_on_the_terminal_and_in_wandb(evaluate, tmp_path):
    write_pairs(tmp_path / "pairs", rows=2, first=0)
    given = ("--data", "pairs", "--task", "orpo", "--samples", "1", "--max-new-tokens", "2", "--wandb")
    done = evaluate(*given)
    assert done.exit_code == 0, done.output
    assert "Preferences by orpo: accuracy in %" in done.stdout and "│ rejected " in done.stdout
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert (found["settings"]["task"], found["settings"]["data"], found["losses"]) == ("orpo", "pairs", [])
    with (tmp_path / "out" / "preferences.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in found["preferences"]] == rows
    assert [row["domain"] for row in rows] == ["code", "math", "(all pairs)", "(domain mean)"]
    (file,) = run_files(tmp_path / "out")
    (row,) = history(file)
    assert row["eval/all_pairs/orpo/accuracy"] == pytest.approx(found["preferences"][2]["on_accuracy"])
    (table,) = (tmp_path / "out").rglob("media/table/evaluation/preferences*.json")
    assert json.loads(table.read_text("utf-8"))["data"][0][:3] == ["orpo", "code", 2]


def test_a_refusal_of_pairs_names_flags(evaluate, tmp_path):
    write_pairs(tmp_path / "pairs", rows=2, first=0)
    done = evaluate("--data", "pairs", "--task", "sft")
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "which --task sft does not do" in said
    assert "--task dpo measures which answers of pairs a model prefers" in said


def test_wandb_that_cannot_start_costs_no_evaluation(evaluate, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "of")
    with monkeypatch.context() as patch:
        patch.setattr("lmoe.evaluate.evaluate.evaluate", lambda *_, **__: pytest.fail("measured"))
        done = evaluate("--wandb")
    assert done.exit_code == 1
    assert done.stderr.startswith("WANDB_MODE=of: no such mode of W&B")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "none")
    done = evaluate("--limit", "1", "--wandb")
    assert done.exit_code == 0, done.output
    assert "W&B is not reached" in done.stdout and "wandb sync" in done.stdout
    assert len(run_files(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "/nowhere/rows.jsonl"), "/nowhere/rows.jsonl: no such file or folder"),
        (("--data", "bad.jsonl"), "bad.jsonl:2: malformed JSON"),
        (("--data", "empty.jsonl"), "empty.jsonl: no rows"),
        (("--data", "quiz.jsonl"), "rows cannot be used: quiz.jsonl:1, quiz.jsonl:2: unknown row format"),
        (("--max-length", "4"), "raise --max-length (now 4)"),
        (("--max-length", "4000"), "--max-length 4000 is beyond the backbone's context of 128 tokens"),
        (("--choices", "wrong.jsonl"), "wrong.jsonl:1: answer must be the index of the right choice, 0 to 1, got 7"),
        (("--choices", "/nowhere"), "--choices /nowhere: no such file or folder"),
        (("--data", "none"), "leaves nothing to measure"),
        (("--data", "none", "--choices", "quiz.jsonl", "--samples", "1"), "--data none has none"),
        (("--task-path", "."), "--task-path . is for --tasks"),
        (("--tasks", " , "), "names no task"),
        (("--prompts", "bare"), "neither was given"),
        (("--domain", "code"), "this checkpoint has moe.router=top_k"),
        (("--max-new-tokens", "3"), "--max-new-tokens 3 is for --samples"),
        (("--chat-template", "/nowhere/t.jinja"), "/nowhere/t.jinja: cannot be read"),
        (("--device", "nonsense"), "--device nonsense: the model cannot be moved there"),
        (("--base-model", "/nowhere/model"), "no such model directory"),
        (("--output", "quiz.jsonl"), "--output quiz.jsonl: a file is there"),
    ],
)
def test_an_error_of_the_user_is_one_message(evaluate, tmp_path, arguments, said):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 7}\n')
    output = None if "--output" in arguments else "out"
    done = evaluate(*arguments, output=output)
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_none_is_named(evaluate, own_run):
    done = evaluate(checkpoint="/nowhere/run")
    assert (done.exit_code, done.output) == (1, "/nowhere/run: no such run or adapter directory\n")
    (own_run / "adapter" / "lmoe_config.json").unlink()
    done = evaluate(checkpoint=str(own_run))
    assert done.exit_code == 1
    assert "the run has not finished: resume=<run> continues it" in done.output


def test_help_lists_every_option():
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for option in ("--checkpoint", "--data", "--choices", "--samples", "--tasks", "--task-path", "--wandb", "--limit"):
        assert option in shown
