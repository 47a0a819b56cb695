"""`lmoe explain`: the page, the JSON and the table of a run, and clear words where flags cannot stand together."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmoe.cli.main import app
from lmoe.report.tokens import visible
from tests.report.html_page import ParsedPage


def explain(*arguments: str | Path):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_a_prompt_is_explained_as_a_page_as_json_and_as_a_table(restored, finished_run: Path) -> None:
    prompt = ("--prompt", "code 1: say red", "--max-new-tokens", "4", "--profile-rows", "1")
    done = explain("--checkpoint", finished_run, *prompt, "--output", "page.html")
    assert done.exit_code == 0, done.output
    assert "mean over its tokens" in done.stdout and "page.html (open it in a browser), page.json" in done.stdout
    assert "tokens through the model" in done.stderr
    found = json.loads(Path("page.json").read_text())
    assert (found["schema"], found["version"]) == ("lmoe.explain", 1)
    [text] = found["texts"]
    assert "say red" in "".join(text["tokens"]) and sum(text["answer"]) == 4 and text["generated"]
    assert len(text["weights"]) == len(found["sites"]) and len(text["token"]) == len(text["ids"])
    assert {row[0] for row in found["profiles"]["experts"][0]["loss_without"]} == {"code", "math", "words"}
    page = ParsedPage(Path("page.html").read_text())
    assert page.text("list", "token") == "".join(visible(token) or "·" for token in text["tokens"])
    again = explain("--checkpoint", finished_run, *prompt, "--output", "page.html")  # over the older page
    assert again.exit_code == 0 and json.loads(Path("page.json").read_text()) == found


def test_validation_rows_of_a_domain_keep_their_answers_and_are_compared_with_another_run(
    restored, finished_run: Path
) -> None:
    asked = ("--domain", "math", "--limit", "1", "--max-tokens", "12", "--profile-rows", "0")
    done = explain("--checkpoint", finished_run, *asked, "--compare", finished_run, "--output", "page.html")
    assert done.exit_code == 0, done.output
    assert "cut" in done.stderr
    found = json.loads(Path("page.json").read_text())
    [text] = found["texts"]
    assert text["domain"] == "math" and len(text["ids"]) == 12 and text["cut"] > 0 and not text["generated"]
    assert found["other"]["texts"][0]["mixture"] == text["mixture"] and found["profiles"] is None


def test_rows_of_a_file_are_explained(restored, finished_run: Path, micro, tmp_path: Path) -> None:
    rows = shutil.copy(micro.val / "code.jsonl", tmp_path / "[red]code.jsonl")
    asked = ("--rows", rows, "--limit", "2", "--profile-rows", "0", "--max-tokens", "16")
    done = explain("--checkpoint", finished_run, *asked, "--output", "page.html")
    assert done.exit_code == 0, done.output
    assert "[red]code.jsonl:1: cut, " in done.stderr
    assert len(json.loads(Path("page.json").read_text())["texts"]) == 2


def test_a_row_is_cut_where_the_context_of_the_backbone_ends(restored, finished_run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "red stone " * 100}) + "\n")
    asked = ("--rows", rows, "--profile-rows", "0", "--max-tokens", "1024")
    done = explain("--checkpoint", finished_run, *asked, "--output", "page.html")
    assert done.exit_code == 0, done.output
    [text] = json.loads(Path("page.json").read_text())["texts"]
    assert len(text["ids"]) == 128 and text["cut"] > 0


def test_rows_of_a_file_call_our_keys_as_the_rows_of_the_run_do(restored, own_run: Path, tmp_path: Path) -> None:
    config, rows = own_run / "config.yaml", tmp_path / "rows.jsonl"
    text = config.read_text()
    assert text.count("columns: {}") == 1
    config.write_text(text.replace("columns: {}", "columns: {prompt: question, response: reply}"))
    rows.write_text('{"question": "say red", "reply": "red"}\n')
    asked = ("--rows", rows, "--profile-rows", "0", "--output", "page.html")
    done = explain("--checkpoint", own_run, *asked)
    assert done.exit_code == 0, done.output
    assert "say red" in "".join(json.loads(Path("page.json").read_text())["texts"][0]["tokens"])


def test_a_base_alone_has_log_probabilities(restored, micro) -> None:
    done = explain("--model", micro.model, "--prompt", "red", "--max-new-tokens", "0", "--output", "page.html")
    assert done.exit_code == 0, done.output
    [text] = json.loads(Path("page.json").read_text())["texts"]
    assert text["mixture"] == text["base"] and text["mixture"][0] is None and text["weights"] == []


def test_a_prompt_that_is_too_long_is_refused_with_its_length(restored, finished_run: Path) -> None:
    asked = ("--checkpoint", finished_run, "--output", "page.html", "--max-new-tokens", "0")
    done = explain(*asked, "--prompt", "red " * 20, "--max-tokens", "16")
    assert done.exit_code == 1 and "tokens, and at most 16 are explained" in done.stderr
    assert "raise --max-tokens" in done.stderr
    done = explain(*asked, "--prompt", "red " * 10_000)
    assert done.exit_code == 1 and "tokens; the backbone's context holds 128. Shorten it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "x"), "give --prompt TEXT, --rows FILE, or --domain NAME"),
        (("--checkpoint", "x", "--prompt", "a", "--rows", "b"), "give --prompt or --rows, not both"),
        (("--checkpoint", "x", "--rows", "b", "--max-new-tokens", "3"), "rows have their own answers"),
        (("--checkpoint", "x", "--prompt", "a", "--limit", "3"), "--limit has no effect with --prompt"),
        (("--model", "x", "--prompt", "a", "--compare", "y"), "--compare has no effect without --checkpoint"),
        (("--checkpoint", "x", "--prompt", "a", "--compare-weights", "1"), "--compare-weights has no effect without"),
        (("--model", "x", "--prompt", "a", "--profile-rows", "3"), "--profile-rows has no effect without"),
        *(
            (
                ("--model", "x", "--experts", "a=y,b=z", "--router", router, "--prompt", "a"),
                f"--router {router} decides by itself, and only blends with weights of your own can be explained; use "
                "--router weighted with --weights",
            )
            for router in ("encoder", "arrow")
        ),
    ],
)
def test_flags_that_cannot_stand_together_are_refused_before_anything_is_loaded(arguments, message, tmp_path) -> None:
    done = explain(*arguments, "--output", tmp_path / "page.html")
    assert done.exit_code == 1 and message in done.stderr


def test_nothing_but_an_older_explanation_is_written_over(restored, finished_run: Path, tmp_path) -> None:
    Path("page.json").write_text("{}")
    done = explain("--checkpoint", finished_run, "--prompt", "red", "--output", "page.html")
    assert done.exit_code == 1 and "exists and is no explanation; name another file" in done.stderr
    assert Path("page.json").read_text() == "{}" and not Path("page.html").exists()


def test_two_weights_of_a_blend_are_compared(restored, micro, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.peft_experts import write_peft

    base = AutoModelForCausalLM.from_pretrained(micro.model)
    places = [write_peft(base, tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    blend = ("--model", micro.model, "--experts", f"a={places[0]},b={places[1]}", "--weights", "0.5,0.5")
    asked = ("--prompt", "say red", "--max-new-tokens", "2", "--compare-weights", "1,0", "--output", "page.html")
    done = explain(*blend, *asked)
    assert done.exit_code == 0, done.output
    found = json.loads(Path("page.json").read_text())
    assert found["experts"] == ["a", "b"] and found["kind"] == "a blend: a=0.5, b=0.5"
    assert found["other"]["kind"] == "a blend: a=1, b=0"
    [text], [other] = found["texts"], found["other"]["texts"]
    assert text["ids"] == other["ids"] and text["mixture"] != other["mixture"] and text["base"] == other["base"]
