"""`lmoe export` and `lmoe convert`: options that cannot act are refused, and what was written is said."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lmoe
from lmoe.cli.export import ExportFlags, ExportFormat, run
from lmoe.cli.main import app
from lmoe.cli.speak import SpeakerFlags
from lmoe.peft.reader import read_expert
from tests.export.gguf.folders import contents
from tests.gguf_file import need_gguf
from tests.micro import write_rows
from tests.peft_experts import write_peft
from tests.tiny_models import randomise, tokens


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
        (["--model", "m", "--experts", "a=b", "--format", "gguf"], "takes a Hugging Face folder, not a blend"),
        (["--model", "m", "--format", "gguf-lora"], "give --experts name=DIR,… to blend over it"),
        (["--model", "m", "--format", "gguf", "--precision", "bfloat16"], "--precision has no effect"),
        (["--model", "m", "--format", "gguf", "--trust-remote-code"], "--trust-remote-code has no effect"),
        (["--model", "m", "--format", "gguf", "--rank", "2"], "--rank has no effect but on a blend with --format peft"),
        (["--model", "m", "--format", "gguf", "--data", "d"], "--data has no effect with --format gguf"),
        (["--model", "m", "--format", "gguf"], "must be the name of a file that ends in .gguf"),
        (["--model", "m/m.gguf", "--format", "gguf"], "must be the name of a file that ends in .gguf"),
        (["--checkpoint", "c", "--gguf-type", "f16"], "--gguf-type has no effect with --format peft"),
    ],
)
def test_options_of_runs_and_of_blends_are_told_apart(given, reason, tmp_path):
    done = CliRunner().invoke(app, ["export", *given, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1 and reason in " ".join(done.output.split())


def test_a_folder_becomes_a_gguf_file_of_the_type_that_is_asked_for(micro, tmp_path):
    need_gguf()
    base = AutoModelForCausalLM.from_pretrained(micro.model).eval()
    sizes = {}
    for given, kind in (([], "f16"), (["--gguf-type", "f32"], "f32")):
        file = tmp_path / f"{kind}.gguf"
        command = ["export", "--model", str(micro.model), "--format", "gguf", "--output", str(file), *given]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0 and f"GGUF model ({kind}) in {file}" in " ".join(done.stdout.split()), done.output
        sizes[kind] = file.stat().st_size
    assert sizes["f16"] < 0.75 * sizes["f32"]
    embedding = contents(tmp_path / "f32.gguf")[1]["token_embd.weight"]
    np.testing.assert_array_equal(embedding, base.get_input_embeddings().weight.detach().numpy())
    again = CliRunner().invoke(app, [*command[:-4], "--output", str(file)])
    assert again.exit_code == 1 and "is there already; name another file" in " ".join(again.output.split())


def test_a_blend_becomes_one_lora_for_llama_cpp(blend, tmp_path):
    need_gguf()
    given, _ = blend
    command = [*given, "--format", "gguf-lora", "--output"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "lora.gguf")])
    assert done.exit_code == 0 and "rank 6 at 14 weights" in " ".join(done.stdout.split()), done.output
    metadata, tensors = contents(tmp_path / "lora.gguf")
    assert CliRunner().invoke(app, [*given, "--output", str(tmp_path / "peft")]).exit_code == 0
    branch = read_expert(tmp_path / "peft").branches["model.layers.1.self_attn.v_proj"]
    assert (metadata["adapter.type"], metadata["adapter.lora.alpha"], len(tensors)) == ("lora", 6 * branch.scaling, 28)
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight.lora_b"], branch.lora_B.numpy())
    done = CliRunner().invoke(app, [*command, str(tmp_path / "small.gguf"), "--rank", "3"])
    assert "rank 3 at 14 weights" in " ".join(done.stdout.split()), done.output
    assert "|exact - written| / |exact| is 0." in " ".join(done.stdout.split())


def test_plain_lora_becomes_a_lora_for_llama_cpp(micro, tmp_path):
    need_gguf()
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    lmoe.inject(model, {"strategy": "dense_lora", "lora_r": 3, "lora_alpha": 5.0})
    randomise(model)
    lmoe.save(model, tmp_path / "adapter")
    command = ["export", "--checkpoint", str(tmp_path / "adapter"), "--format", "gguf-lora"]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "lora.gguf")])
    assert done.exit_code == 0 and "rank 3 at 10 weights" in " ".join(done.stdout.split()), done.output
    metadata, tensors = contents(tmp_path / "lora.gguf")
    site = model.model.layers[1].mlp.up_proj
    assert metadata["adapter.lora.alpha"] == 5.0
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight.lora_b"], site.lora_B.detach().numpy())


def test_a_mixture_is_no_lora_and_a_run_no_folder(finished_run, tmp_path):
    need_gguf()
    for format, reason in (
        ("gguf-lora", "chooses its experts by itself"),
        ("gguf", "--format gguf takes a Hugging Face folder, not a run; write one first (--format native-moe"),
    ):
        command = ["export", "--checkpoint", str(finished_run), "--format", format]
        done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out.gguf")])
        assert done.exit_code == 1 and reason in " ".join(done.output.split()), done.output


def test_the_command_line_knows_them(capsys):
    for arguments in (["export", "--checkpoint", "a", "--output", "b", "--format", "lmoe"], ["convert", "--help"]):
        with pytest.raises(SystemExit):
            app(arguments)
    assert "name it with --without-expert" in " ".join(capsys.readouterr().err.split())
