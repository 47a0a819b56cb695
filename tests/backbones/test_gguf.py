"""A base that is a GGUF file: read as plain numbers, found again by every verb, refused by name where it cannot be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lmoe
from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.load import (
    bare_model,
    context_length,
    has_weights,
    load_model,
    load_tokenizer,
    model_type,
    precision_of,
)
from lmoe.cli.main import app
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError, CheckpointError
from lmoe.rules.backbone import backbone_problems
from lmoe.vocabulary import QUANTISED, BackbonePrecision
from tests.gguf_file import need_gguf, save_qwen2, write_gguf
from tests.tiny_models import randomise

PLAIN = [kind for kind in BackbonePrecision if kind not in QUANTISED]


@pytest.fixture(scope="module")
def base(micro, tmp_path_factory) -> Path:
    """A base as a folder in the format of Transformers."""
    return save_qwen2(tmp_path_factory.mktemp("base"), micro.model)


@pytest.fixture(scope="module")
def gguf_base(base, tmp_path_factory) -> Path:
    """The same base as a GGUF file in a folder of its own."""
    need_gguf()
    return write_gguf(base, tmp_path_factory.mktemp("gguf") / "micro.gguf")


def of(file: Path, precision: BackbonePrecision = BackbonePrecision.float32) -> BackboneConfig:
    return BackboneConfig(model_name=str(file.parent), gguf_file=file.name, precision=precision)


def test_a_gguf_file_of_a_base_is_that_base(gguf_base, base):
    config, folder = of(gguf_base), BackboneConfig(model_name=str(base))
    model, wanted = load_model(config), load_model(folder)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in wanted.state_dict().items())
    assert base_fingerprint(model) == base_fingerprint(wanted)
    assert (context_length(model), model_type(config)) == (context_length(wanted), model_type(folder))
    assert has_weights(config)
    tokens, own = load_tokenizer(config), load_tokenizer(folder)
    text = own.apply_chat_template([{"role": "user", "content": "code 1: say red, it's 12"}], tokenize=False)
    assert tokens.chat_template == own.chat_template
    assert tokens(text).input_ids == own(text).input_ids
    assert (tokens.eos_token, tokens.pad_token) == (own.eos_token, own.pad_token)


def test_the_estimate_sees_the_sizes_of_a_gguf_file_without_its_weights(gguf_base, base):
    bare, folder = bare_model(of(gguf_base)), bare_model(BackboneConfig(model_name=str(base)))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (bare, folder)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in bare.parameters()} == {"meta"}


@pytest.mark.parametrize("precision", PLAIN)
def test_a_quantised_file_becomes_plain_numbers_in_the_precision_asked_for_and_can_be_saved(
    precision, base, gguf_base, tmp_path
):
    file = write_gguf(base, tmp_path / "small.gguf", kind="Q8_0")
    model, wanted = load_model(of(file, precision)), load_model(BackboneConfig(model_name=str(base)))
    assert precision_of(model) is precision
    assert {p.dtype for p in model.parameters()} == {getattr(torch, precision)}
    q = "model.layers.0.self_attn.q_proj.weight"
    exact, found = wanted.get_parameter(q), model.get_parameter(q).float()
    assert not torch.equal(exact, found)
    torch.testing.assert_close(exact, found, atol=0.01, rtol=0)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=getattr(torch, precision))
    assert base_fingerprint(again) == base_fingerprint(model)


def test_a_name_that_ends_in_gguf_is_a_folder_and_a_file(gguf_base, tmp_path, monkeypatch):
    assert BackboneConfig(model_name=str(gguf_base)) == of(gguf_base)
    assert of(gguf_base).full_name == str(gguf_base)
    hub = BackboneConfig(model_name="owner/repository/file.gguf")
    assert (hub.model_name, hub.gguf_file) == ("owner/repository", "file.gguf")
    assert backbone_problems(hub) == []
    monkeypatch.chdir(gguf_base.parent)
    assert backbone_problems(BackboneConfig(model_name="micro.gguf")) == []
    (tmp_path / "folder.gguf").mkdir()
    assert BackboneConfig(model_name=str(tmp_path / "folder.gguf")).gguf_file is None


def test_a_file_of_the_same_name_in_the_working_directory_is_not_taken_instead(gguf_base, tmp_path, monkeypatch):
    (tmp_path / gguf_base.name).write_bytes(b"another file")
    monkeypatch.chdir(tmp_path)
    load_model(of(gguf_base))
    load_tokenizer(of(gguf_base))


def test_a_gguf_file_of_the_hub_is_fetched_by_its_repository_and_keeps_that_name(gguf_base, monkeypatch):
    asked: list[tuple[str, str, str | None]] = []

    def fetched(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(gguf_base)

    monkeypatch.setattr("lmoe.backbones.load.cached_file", fetched)
    monkeypatch.setattr("lmoe.backbones.load.find_adapter_config_file", lambda source, revision: None)
    config = BackboneConfig(model_name="owner/repository/micro.gguf", revision="v1")
    model = load_model(config)
    assert asked == [("owner/repository", "micro.gguf", "v1")]
    assert model.name_or_path == "owner/repository/micro.gguf"
    assert BackboneConfig(model_name=str(model.name_or_path)) == replace(config, revision=None)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_gguf_file_is_not_quantised_a_second_time(precision, gguf_base):
    config = of(gguf_base, precision)
    [problem] = backbone_problems(config)
    assert f"backbone.precision={precision} would quantise micro.gguf a second time" in problem
    with pytest.raises(BackboneError, match="a second time"):
        load_model(config)


def test_what_names_no_gguf_file_is_one_problem_each(gguf_base, tmp_path):
    folder = gguf_base.parent
    wanted = [
        (BackboneConfig(model_name=str(gguf_base), gguf_file="other.gguf"), "name two files; give one of them"),
        (
            BackboneConfig(model_name=str(folder), gguf_file="model.bin"),
            "must be the name of a file that ends in .gguf",
        ),
        (
            BackboneConfig(model_name=str(folder), gguf_file="../a.gguf"),
            "must be the name of a file that ends in .gguf",
        ),
        (BackboneConfig(model_name=f"{folder}/no.gguf"), f"no.gguf: no such file; {folder} has micro.gguf"),
        (BackboneConfig(model_name=f"{tmp_path}/no.gguf"), f"no such file; {tmp_path} has none that ends in .gguf"),
        (BackboneConfig(model_name="nowhere/no.gguf"), "no folder nowhere here, and a file of the hub is named owner/"),
        (BackboneConfig(model_name="tiny", gguf_file="a.gguf"), "has no effect with backbone.model_name=tiny"),
    ]
    for config, message in wanted:
        [problem] = backbone_problems(config)
        assert message in problem
        with pytest.raises(BackboneError) as failed:
            load_model(config)
        assert message in str(failed.value)


def test_a_folder_of_gguf_files_alone_says_how_one_is_named(gguf_base, tmp_path):
    shutil.copy(gguf_base, tmp_path / "b.gguf")
    with pytest.raises(BackboneError, match=rf"no model but b\.gguf: name it, backbone\.model_name={tmp_path}/b\.gguf"):
        load_model(BackboneConfig(model_name=str(tmp_path)))
    shutil.copy(gguf_base, tmp_path / "a.gguf")
    with pytest.raises(BackboneError, match=rf"name one of a\.gguf, b\.gguf, such as .*={tmp_path}/a\.gguf"):
        load_tokenizer(BackboneConfig(model_name=str(tmp_path)))


@pytest.mark.parametrize("load", [load_model, load_tokenizer, bare_model])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.3, 0.9, 0.999])
def test_a_torn_gguf_file_is_named_and_to_be_got_again(load, kept, gguf_base, tmp_path):
    content = gguf_base.read_bytes()
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(BackboneError, match=r"torn\.gguf: .*(damaged|cut off).*; get it again"):
        load(of(torn))


def test_what_is_no_gguf_file_says_so(gguf_base, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK" + bytes(1000))
    with pytest.raises(BackboneError, match=r"model\.gguf: does not begin with GGUF, so it is no GGUF file"):
        load_model(of(tmp_path / "model.gguf"))


@pytest.mark.parametrize("load", [load_model, load_tokenizer, bare_model])
def test_an_architecture_that_transformers_does_not_read_is_named(load, gguf_base, base, tmp_path):
    file = write_gguf(base, tmp_path / "odd.gguf", architecture="rwkv7")
    with pytest.raises(BackboneError, match=r"rwkv7 is not supported.*give the model as a folder in the format of"):
        load(of(file))


def test_without_what_reads_gguf_one_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("lmoe.backbones.load.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(BackboneError, match=r"reading a GGUF file needs gguf: pip install 'lmoe\[gguf\]'"):
        load_tokenizer(of(tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def run(gguf_base, micro, tmp_path_factory) -> Path:
    """A finished run of two steps on the file, with a checkpoint after each."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    folder = tmp_path_factory.mktemp("gguf_run")
    with process_state(folder) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        settings = ("injection=dense_lora", "phase=joint", f"backbone.model_name={gguf_base}", "trainer.max_steps=2")
        assert main([*micro.changed(*settings), f"hydra.run.dir={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_run_on_a_gguf_file_records_it_and_its_adapter_finds_it(run, gguf_base):
    stored = json.loads((run / "adapter/lmoe_config.json").read_text())["base_model"]
    assert (stored["name"], stored["gguf_file"]) == (str(gguf_base.parent), gguf_base.name)
    [record] = json.loads((run / "provenance.json").read_text())
    assert record["backbone"]["gguf_file"] == gguf_base.name
    assert f"gguf_file: {gguf_base.name}" in (run / "config.yaml").read_text()
    assert json.loads((run / "report/summary.json").read_text())["backbone"] == str(gguf_base)
    model, _ = lmoe.load(run)
    assert model.name_or_path == str(gguf_base)


def test_an_adapter_on_a_gguf_file_loads_on_the_same_base_in_another_format(run, base):
    model, _ = lmoe.load(run, base_model=str(base))
    assert model.name_or_path == str(base)


@pytest.mark.parametrize("moved", [None, "micro.gguf", "renamed.gguf"])
def test_a_run_on_a_gguf_file_goes_on_also_where_the_file_has_moved(moved, run, gguf_base, train, tmp_path):
    own = Path(shutil.copytree(run, tmp_path / "own"))
    place = []
    if moved is not None:
        shutil.copy(gguf_base, tmp_path / moved)
        place = [f"backbone.model_name={tmp_path}", f"backbone.gguf_file={moved}"]
    if moved == gguf_base.name:
        place = [f"backbone.model_name={tmp_path}/{moved}"]
    done = train(f"resume={own}", "trainer.max_steps=3", *place, settings=False)
    assert done.code == 0, done.text
    assert "default: 3 steps" in done.text


def test_the_verbs_take_a_gguf_file_where_they_take_a_base(run, gguf_base, micro, tmp_path):
    said = {"--prompt": "code 1: say red", "--max-new-tokens": "3"}
    asked = [part for pair in said.items() for part in pair]
    row = str(micro.val / "code.jsonl")
    expert = ["--experts", f"one={run}"]
    for call in (
        ["generate", "--checkpoint", str(run), *asked],
        ["generate", "--checkpoint", str(run), "--base-model", str(gguf_base), *asked],
        ["generate", "--model", str(gguf_base), *expert, *asked],
        ["prepare", "--model", str(gguf_base), "--data", row, "--cache-dir", str(tmp_path / "cache")],
        ["evaluate", "--checkpoint", str(run), "--data", row, "--limit", "1", "--output", str(tmp_path / "found")],
        ["export", "--checkpoint", str(run), "--format", "merged", "--output", str(tmp_path / "merged")],
        ["export", "--model", str(gguf_base), *expert, "--format", "merged", "--output", str(tmp_path / "blended")],
    ):
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 0, f"{call}: {done.output}"
    merged, blended = (load_model(BackboneConfig(model_name=str(tmp_path / name))) for name in ("merged", "blended"))
    assert all(torch.allclose(p, blended.get_parameter(name)) for name, p in merged.named_parameters())


def test_an_error_of_a_verb_names_its_flag_and_the_file(gguf_base):
    done = CliRunner().invoke(app, ["generate", "--model", f"{gguf_base.parent}/no.gguf", "--prompt", "hello"])
    assert done.exit_code == 1
    assert f"--model {gguf_base.parent}/no.gguf: no such file" in done.output
    done = CliRunner().invoke(app, ["generate", "--model", str(gguf_base), "--precision", "nf4", "--prompt", "hello"])
    assert "--precision nf4 would quantise micro.gguf" in done.output


def test_a_model_in_memory_is_saved_with_its_file_and_what_save_pretrained_writes_stands_alone(gguf_base, tmp_path):
    model, tokenizer = load_model(of(gguf_base)), load_tokenizer(of(gguf_base))
    lmoe.inject(model, injection={"lora_r": 2, "num_experts": 2})
    randomise(model, std=0.1)
    lmoe.save(model, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/lmoe_config.json").read_text())["base_model"]
    assert (stored["name"], stored["gguf_file"]) == (str(gguf_base.parent), gguf_base.name)
    model.save_pretrained(tmp_path / "whole")
    again, _ = lmoe.load(tmp_path / "whole")
    ids = tokenizer("code 1: say red", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_gguf_file_in_an_adapter_that_is_no_text_is_refused(run, tmp_path):
    own = Path(shutil.copytree(run / "adapter", tmp_path / "own"))
    config = json.loads((own / "lmoe_config.json").read_text())
    config["base_model"]["gguf_file"] = 7
    (own / "lmoe_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"base_model\.gguf_file is 7, must be text or null"):
        lmoe.load(own)
