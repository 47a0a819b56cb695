"""`lmoe generate`: any prompt from anywhere, and clear words where there is none."""

import pytest
from typer.testing import CliRunner

import lmoe
from lmoe.cli.main import app
from lmoe.generate.generate import prompt_ids


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
    for option in ("--checkpoint", "--prompt", "--prompt-file", "--max-new-tokens", "--temperature", "--top-p"):
        assert option in shown
