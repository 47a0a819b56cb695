"""`lmoe export` and `lmoe convert`: options that cannot act are refused, and what was written is said."""

import pytest

from lmoe.cli.export import ExportFormat, run
from lmoe.cli.main import app
from tests.micro import write_rows

OPTIONS = {"base_model": None, "without_expert": None, "average_experts": False, "data": None}


@pytest.mark.parametrize(
    ("format", "given", "reason"),
    [
        ("lmoe", {}, "name it with --without-expert"),
        ("lmoe", {"without_expert": "1", "base_model": "x"}, "--base-model has no effect"),
        ("peft", {"without_expert": "1"}, "--without-expert has no effect with --format peft; use --format lmoe"),
        ("peft-experts", {"average_experts": True}, "--average-experts has no effect"),
        ("peft", {"data": "rows"}, "--data has no effect"),
    ],
)
def test_an_option_that_cannot_act_is_refused_before_anything_is_loaded(capsys, format, given, reason):
    code = run("nowhere", output="out", format=ExportFormat(format), **(OPTIONS | given))
    assert code == 1 and reason in " ".join(capsys.readouterr().err.split())


def test_the_average_says_that_it_is_another_model_and_what_it_costs(finished_run, tmp_path, capsys):
    write_rows(tmp_path / "rows", rows=1, first=0)
    given = OPTIONS | {"average_experts": True, "data": str(tmp_path / "rows")}
    assert run(str(finished_run), output=str(tmp_path / "merged"), format=ExportFormat.merged, **given) == 0
    out = capsys.readouterr().out
    assert "warning: the average of the experts is another model than the mixture" in out
    assert "nats per label token" in out and (tmp_path / "merged" / "tokenizer.json").exists()
    given = OPTIONS | {"without_expert": "3"}
    assert run(str(finished_run), output=str(tmp_path / "less"), format=ExportFormat.lmoe, **given) == 0
    assert f"adapter in {tmp_path / 'less'}" in capsys.readouterr().out


def test_the_command_line_knows_them(capsys):
    for arguments in (["export", "--checkpoint", "a", "--output", "b", "--format", "lmoe"], ["convert", "--help"]):
        with pytest.raises(SystemExit):
            app(arguments)
    assert "name it with --without-expert" in " ".join(capsys.readouterr().err.split())
