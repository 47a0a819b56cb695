"""A call is said as a command that a shell and the verb take."""

import shlex

from lmoe.cli.commands import shell_command
from lmoe.run.verb_call import VerbCall, resuming
from tests.micro import ROOT


def test_a_command_names_train_py_only_where_it_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert shell_command(resuming("train", "a/b")) == "python train.py resume=a/b"
    assert shell_command(resuming("pretrain", "a/b")) == "lmoe pretrain resume=a/b"
    monkeypatch.chdir(tmp_path)
    assert shell_command(resuming("train", "a/b")) == "lmoe train resume=a/b"
    (tmp_path / "train.py").write_text("print('of another project')")
    assert shell_command(VerbCall(verb="train", settings={})) == "lmoe train"


def test_settings_of_the_library_become_flags_and_any_text_stays_one_word():
    call = VerbCall(verb="generate", settings={"checkpoint": "my run", "max_new_tokens": 3, "prompt": "it's $HOME"})
    command = shell_command(call)
    assert command.startswith("lmoe generate --checkpoint 'my run' --max-new-tokens 3 --prompt ")
    assert shlex.split(command)[2:] == ["--checkpoint", "my run", "--max-new-tokens", "3", "--prompt", "it's $HOME"]


def test_below_the_command_line_a_call_names_settings():
    call = VerbCall(verb="evaluate", settings={"checkpoint": "run", "samples": 2})
    assert str(call) == "evaluate checkpoint=run samples=2"
