"""`lmoe export` and `lmoe convert`: options that cannot act are refused, and what was written is said."""

import csv
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lmoe
from lmoe.cli.export import ExportFlags, ExportFormat, run
from lmoe.cli.main import app
from lmoe.cli.speak import SpeakerFlags
from tests.micro import write_rows
from tests.peft_experts import write_peft
from tests.tiny_models import tokens


@pytest.mark.parametrize(
    ("format", "given", "reason"),
    [
        ("lmoe", {}, "name it with --without-expert"),
        ("lmoe", {"without_expert": "1", "base_model": "x"}, "--base-model has no effect"),
        ("peft", {"without_expert": "1"}, "--without-expert has no effect with --format peft; use --format lmoe"),
        ("peft-experts", {"average_experts": True}, "--average-experts has no effect"),
        ("peft", {"data": "rows"}, "--data has no effect"),
        ("native-moe", {"data": "rows"}, "--data has no effect with --format native-moe; use --format merged"),
        ("native-moe", {"rank": 2}, "--rank has no effect but on a blend"),
        ("native-moe", {"precision": "nf4"}, "--precision nf4: allowed with --format native-moe: float32, bfloat16, f"),
        ("merged", {"precision": "float32"}, "--precision has no effect with --checkpoint; it goes with --model"),
    ],
)
def test_an_option_that_cannot_act_is_refused_before_anything_is_loaded(capsys, format, given, reason):
    of_source = {name: given[name] for name in ("base_model", "precision") if name in given}
    others = {name: value for name, value in given.items() if name not in of_source}
    source = SpeakerFlags(checkpoint="nowhere", **of_source)
    code = run(source, ExportFlags(output="out", format=ExportFormat(format), **others))
    assert code == 1 and reason in " ".join(capsys.readouterr().err.split())


def test_a_mixture_of_linears_is_told_its_other_formats_in_flags(finished_run, tmp_path, capsys):
    source = SpeakerFlags(checkpoint=str(finished_run))
    assert run(source, ExportFlags(output=str(tmp_path / "out"), format=ExportFormat.native_moe)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "injection=mixture_lora has branches on single Linears as experts" in said
    assert "--format peft-experts" in said and "--format merged --average-experts" in said
    assert not (tmp_path / "out").exists()


def test_the_average_says_that_it_is_another_model_and_what_it_costs(finished_run, tmp_path, capsys):
    write_rows(tmp_path / "rows", rows=1, first=0)
    source = SpeakerFlags(checkpoint=str(finished_run))
    merged = {"output": str(tmp_path / "merged"), "format": ExportFormat.merged, "average_experts": True}
    assert run(source, ExportFlags(**merged, data=str(tmp_path / "rows"))) == 0
    out = capsys.readouterr().out
    assert "warning: the average of the experts is another model than the mixture" in out
    assert "nats per label token" in out and (tmp_path / "merged" / "tokenizer.json").exists()
    less = ExportFlags(output=str(tmp_path / "less"), format=ExportFormat.lmoe, without_expert="3")
    assert run(source, less) == 0
    assert f"adapter in {tmp_path / 'less'}" in capsys.readouterr().out


def test_the_cost_of_an_average_is_measured_on_the_rows_of_the_run_unless_none_are_wanted(
    finished_run, tmp_path, capsys
):
    average = ("export", "--checkpoint", str(finished_run), "--format", "merged", "--average-experts")
    done = CliRunner().invoke(app, [*average, "--output", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    after = validation_loss(finished_run)
    assert f"loss on the validation rows: {after:.4f} with the adapters" in done.stdout
    done = CliRunner().invoke(app, [*average, "--output", str(tmp_path / "b"), "--data", "none"])
    assert done.exit_code == 0 and "loss on" not in done.stdout


def validation_loss(run_dir: Path) -> float:
    """The last one that the run has logged."""
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as lines:
        return [float(row["val/loss"]) for row in csv.DictReader(lines) if row.get("val/loss")][-1]


@pytest.fixture
def blend(micro, tmp_path):
    """Flags of a blend of two experts on the micro backbone, and the blend itself."""
    base = AutoModelForCausalLM.from_pretrained(micro.model).eval()
    places = {name: write_peft(base, tmp_path / "experts" / name, r=r) for name, r in (("code", 4), ("chat", 2))}
    experts = ",".join(f"{name}={place}" for name, place in places.items())
    given = ["export", "--model", str(micro.model), "--experts", experts, "--weights", "0.7,0.3"]
    lmoe.Blend(base, places, {"code": 0.7, "chat": 0.3})
    return given, base


def test_a_blend_is_exported_exactly_or_at_a_rank_with_its_error(blend, micro, tmp_path):
    given, blending = blend
    done = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "cat")])
    assert done.exit_code == 0 and "rank 6 at 14 sites, exact" in " ".join(done.stdout.split()), done.output
    base = AutoModelForCausalLM.from_pretrained(micro.model).eval()
    with torch.no_grad():
        expected, plain = (m(input_ids=tokens()).logits for m in (blending, base))
        found = PeftModel.from_pretrained(base, tmp_path / "cat")(input_ids=tokens()).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "cat").vocab_size
    done = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "svd"), "--rank", "3"])
    assert "rank 3 at 14 sites; |exact - written| / |exact| is 0." in " ".join(done.stdout.split()), done.output


def test_a_blend_is_merged_into_a_model_of_hugging_face(blend, tmp_path):
    given, blending = blend
    done = CliRunner().invoke(app, [*given, "--format", "merged", "--output", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            found(input_ids=tokens()).logits, blending(input_ids=tokens()).logits, atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "give --checkpoint RUN"),
        (["--model", "m"], "give --experts name=DIR,… to blend over it"),
        (["--model", "m", "--experts", "a=b", "--format", "peft-experts"], "--format peft-experts is for --checkpoint"),
        (["--model", "m", "--experts", "a=b", "--format", "merged", "--rank", "2"], "--rank has no effect"),
        (["--checkpoint", "c", "--rank", "2"], "--rank has no effect"),
        (["--checkpoint", "c", "--weights", "1"], "--weights has no effect with --checkpoint"),
        (["--model", "m", "--experts", "a=b", "--data", "d"], "--data has no effect with --model"),
    ],
)
def test_options_of_runs_and_of_blends_are_told_apart(given, reason, tmp_path):
    done = CliRunner().invoke(app, ["export", *given, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1 and reason in " ".join(done.output.split())


def test_the_command_line_knows_them(capsys):
    for arguments in (["export", "--checkpoint", "a", "--output", "b", "--format", "lmoe"], ["convert", "--help"]):
        with pytest.raises(SystemExit):
            app(arguments)
    assert "name it with --without-expert" in " ".join(capsys.readouterr().err.split())
