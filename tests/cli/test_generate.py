"""`lmoe generate`: any prompt from anywhere, and clear words where there is none."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

import lmoe
from lmoe.cli.main import app
from lmoe.generate.conversation import prompt_ids


@pytest.fixture
def generate(restored, finished_run):
    def command(*arguments: str, checkpoint: str | None = None, text: str | None = None):
        place = str(finished_run) if checkpoint is None else checkpoint
        return CliRunner().invoke(
            app, ["generate", "--checkpoint", place, "--max-new-tokens", "6", *arguments], input=text
        )

    return command


def expected(run, prompt: str) -> str:
    """Greedy tokens one by one, without a KV cache."""
    import torch

    model, tokenizer = lmoe.load(run)
    ids = prompt_ids(tokenizer, prompt)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if int(token) == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


PROMPT = "it's a, b = {c}!"


def test_a_prompt_with_every_awkward_character_is_answered(generate, finished_run):
    done = generate("--prompt", PROMPT)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == expected(finished_run, PROMPT).strip()


@pytest.mark.parametrize("arguments", [(), ("--prompt-file", "-")], ids=["no option", "-"])
def test_the_prompt_may_come_from_standard_input(generate, arguments):
    assert generate(*arguments, text=PROMPT).stdout == generate("--prompt", PROMPT).stdout


def test_the_prompt_may_come_from_a_file(generate, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    assert generate("--prompt-file", str(tmp_path / "prompt.txt")).stdout == generate("--prompt", PROMPT).stdout


def test_an_adapter_directory_serves_as_well_as_its_run(generate, finished_run):
    assert generate("--prompt", PROMPT, checkpoint=str(finished_run / "adapter")).stdout == (
        generate("--prompt", PROMPT).stdout
    )


def test_sampling_follows_the_seed(generate):
    hot = ("--prompt", PROMPT, "--temperature", "5")
    first, again, other = (generate(*hot, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (("--prompt", "  "), None, "the prompt is empty"),
        (("--prompt", "caf\udce9"), None, "the prompt is not UTF-8: character 4 cannot be decoded"),
        ((), b"caf\xe9", "standard input cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        (("--prompt", "a", "--temperature", "1e-300"), None, "temperature=1e-300 must be 0, or 1e-06 or more"),
        (("--prompt", "a", "--temperature", "1", "--seed", str(10**30)), None, "must be from -2^63 to 2^64 - 1"),
        (("--prompt", "a", "--top-k", str(10**30), "--temperature", "1"), None, "at most 1,000,000,000"),
        ((), "", "the prompt is empty"),
        (("--prompt", "a", "--prompt-file", "b"), None, "--prompt or --prompt-file, not both"),
        (("--prompt-file", "/nowhere/prompt.txt"), None, "--prompt-file /nowhere/prompt.txt: cannot be read"),
        (("--prompt", "blue " * 200), None, "the backbone's context holds 128. Shorten it (chat template of "),
        (("--prompt", "a", "--base-model", "/nowhere/model"), None, "no such model directory"),
    ],
)
def test_an_error_of_the_user_is_one_message(generate, arguments, text, said):
    done = generate(*arguments, text=text)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output and "config:" not in done.output
    assert len(done.output.splitlines()) == 1


@pytest.fixture
def rows(tmp_path):
    """Prompts with long and short answers, and one that leaves no room in the context."""
    texts = [PROMPT, "say red", "blue " * 200, "code 3: say green and blue"]
    lines = [json.dumps({"prompt": text, "response": "yes", "domain": "code"}) + "\n" for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts


def test_rows_are_answered_as_their_prompts_are_one_by_one(generate, finished_run, rows, tmp_path):
    done = generate("--rows", "rows.jsonl", "--output", "answers.jsonl", "--batch-size", "2")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    answers = [None if text.startswith("blue") else expected(finished_run, text) for text in rows]
    assert [line["answer"] for line in found] == answers
    assert done.stdout.startswith("3 answers in answers.jsonl\n1 rows have no answer (null) but a problem:\n  row 2: ")
    assert "row 3/3" in done.stderr and "rows/s" in done.stderr
    again = generate("--rows", "rows.jsonl", "--output", "answers.jsonl")
    assert again.exit_code == 1
    assert again.output == "--output answers.jsonl exists and is not an empty file; name another one\n"


def test_rows_are_asked_as_the_run_was_taught(generate, finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = (run / "config.yaml").read_text("utf-8")
    assert "prompt_prefix: null" in config and "columns: {}" in config
    config = config.replace("prompt_prefix: null", "prompt_prefix: 'say '").replace(
        "columns: {}", "columns: {prompt: q}"
    )
    (run / "config.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "red", "response": "yes"}) + "\n", encoding="utf-8")
    done = generate("--rows", "rows.jsonl", "--output", "answers.jsonl", checkpoint=str(run))
    assert done.exit_code == 0, done.output
    [line] = map(json.loads, (tmp_path / "answers.jsonl").read_text("utf-8").splitlines())
    assert line["prompt"] == [{"role": "user", "content": "say red"}]
    assert line["answer"] == expected(finished_run, "say red")


def test_rows_of_a_blend_go_on_after_ctrl_c_and_not_with_other_weights(restored, micro, rows, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from lmoe.generate.answer_file import AnswerFile
    from tests.peft_experts import three

    base = AutoModelForCausalLM.from_pretrained(micro.model)
    places = three(base, tmp_path / "experts")
    experts = ",".join(f"{name}={places[name]}" for name in ("code", "sql"))

    def blend(*more: str, output="answers.jsonl"):
        settings = ("--max-new-tokens", "6", "--batch-size", "1", "--output", output)
        model = ("--model", str(micro.model), "--experts", experts)
        return CliRunner().invoke(app, ["generate", "--rows", "rows.jsonl", *model, *settings, *more])

    add = AnswerFile.add

    def interrupted(file, answers):
        add(file, answers)
        if len(file.done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", interrupted)
        stopped = blend("--weights", "0.7,0.3")
    assert stopped.exit_code == 130
    assert "stopped: the same command goes on from answers.jsonl.part" in stopped.stderr
    other = blend("--weights", "0.3,0.7")
    assert other.exit_code == 1
    assert "answers of another command: weights was code=0.7 sql=0.3, is code=0.3 sql=0.7" in other.output
    assert "name another --output" in other.output
    gone_on, whole = blend("--weights", "0.7,0.3"), blend("--weights", "0.7,0.3", output="whole.jsonl")
    assert (gone_on.exit_code, whole.exit_code) == (0, 0)
    assert "2 of 3 rows were answered before" in gone_on.stderr
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "answers.jsonl.part").exists()


ROWS, OUTPUT = ("--rows", "rows.jsonl"), ("--output", "out.jsonl")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ROWS, "--rows needs --output FILE, where the answers go"),
        (OUTPUT, "--output has no effect without --rows; leave it out"),
        (("--prompt", "a", "--batch-size", "4"), "--batch-size has no effect without --rows; leave it out"),
        ((*ROWS, *OUTPUT, "--prompt", "a"), "give --rows or --prompt, not both"),
        ((*ROWS, *OUTPUT, "--prompt-file", "a"), "give --rows or --prompt-file, not both"),
        (("--rows", "none.jsonl", *OUTPUT), "none.jsonl: no such file or folder"),
        (("--rows", "empty.jsonl", *OUTPUT), "empty.jsonl: no rows"),
        (("--rows", "bad.jsonl", *OUTPUT), "bad.jsonl:1: malformed JSON"),
        (("--rows", "answers.jsonl", *OUTPUT), "no row can be answered; row 0: no prompt: nothing stands before the"),
        ((*ROWS, "--output", "-"), "--output -: answers of rows are written to a file"),
        ((*ROWS, "--output", "none/out.jsonl"), "--output none/out.jsonl: there is no folder none; make it first"),
        ((*ROWS, "--output", "."), "--output . is a folder; name a file in it"),
        ((*ROWS, "--output", "rows.jsonl"), "--output rows.jsonl exists and is not an empty file"),
        ((*ROWS, *OUTPUT, "--temperature", "-1"), "--temperature"),
        (
            (*ROWS, *OUTPUT, "--domain", "code"),
            "has moe.router=top_k: leave the domain out, its router decides without",
        ),
    ],
)
def test_a_command_about_rows_that_cannot_be_is_one_message_and_writes_nothing(
    generate, rows, tmp_path, arguments, said
):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt"\n')
    (tmp_path / "answers.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hi"}]}\n')
    before = sorted(os.listdir(tmp_path))
    done = generate(*arguments)
    assert done.exit_code != 0
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert sorted(os.listdir(tmp_path)) == before


def test_a_flag_that_is_missing_is_no_problem_of_a_config():
    done = CliRunner().invoke(app, ["generate", "--prompt", "hi"])
    assert done.exit_code == 1
    assert done.output == "give --checkpoint RUN (a trained mixture) or --model BASE (with --experts name=DIR,…)\n"


def test_a_checkpoint_that_is_none_is_named(generate, own_run, tmp_path):
    done = generate("--prompt", "a", checkpoint="/nowhere/run")
    assert done.exit_code == 1
    assert "/nowhere/run: no such run or adapter directory" in done.output
    (own_run / "adapter" / "lmoe_config.json").unlink()
    done = generate("--prompt", "a", checkpoint=str(own_run))
    assert done.exit_code == 1
    assert "the run has not finished: resume=<run> continues it" in done.output
    done = generate("--prompt", "a", checkpoint=str(tmp_path))
    assert done.exit_code == 1


def test_help_lists_every_verb_and_option():
    shown = CliRunner().invoke(app, ["--help"]).output
    for verb in ("train", "pretrain", "generate", "prepare"):
        assert verb in shown
    shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for option in (
        "--checkpoint",
        "--prompt",
        "--prompt-file",
        "--rows",
        "--output",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
    ):
        assert option in shown
