"""Commands that name a run directory, as a shell and then Hydra read them."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lmoe.schema.run_folder import resume_setting, run_command
from tests.micro import ROOT


@pytest.mark.parametrize(
    "place",
    [
        "outputs/sft/default/2026-11-22_10-00-00",
        "/runs/a b=c,d",
        "it's",
        "/home/é/日",
        "runs/a~1",
        "1e3",
        "null",
        r"C:\runs\new",
        "ends\\",
        "a\\'b",
        "${now}",
        "[a](b){c}",
    ],
)
def test_any_path_arrives_as_it_is(place):
    (word,) = shlex.split(resume_setting(place))
    assert OverridesParser.create().parse_override(word).value() == place


def test_a_command_names_train_py_only_where_it_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert run_command("train", "resume=a/b") == "python train.py resume=a/b"
    assert run_command("pretrain", "resume=a/b") == "lmoe pretrain resume=a/b"
    monkeypatch.chdir(tmp_path)
    assert run_command("train", "resume=a/b") == "lmoe train resume=a/b"
    (tmp_path / "train.py").write_text("print('of another project')")
    assert run_command("train") == "lmoe train"
