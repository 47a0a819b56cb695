"""Loading a local directory, and what is said when there is nothing to load."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmoe.backbones.load import (
    QUANTISED,
    bare_model,
    load_model,
    load_tokenizer,
    model_source,
    model_type,
    tokenizer_in,
)
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError
from lmoe.pretrain.bpe import train_bpe
from lmoe.rules.trust import would_run
from lmoe.vocabulary import BackbonePrecision
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tiny_model(vocab_size=300).save_pretrained(path)
    train_bpe(["some text"], 300, 64).save_pretrained(path)
    return path


@pytest.mark.parametrize("precision", [kind for kind in BackbonePrecision if kind not in QUANTISED])
def test_a_local_directory_loads_frozen_in_evaluation_mode_in_the_precision_asked_for(folder, precision):
    model = load_model(BackboneConfig(model_name=str(folder), precision=precision))
    assert not model.training
    assert {p.requires_grad for p in model.parameters()} == {False}
    assert {p.dtype for p in model.parameters()} == {getattr(torch, precision)}
    assert model_type(BackboneConfig(model_name=str(folder))) == "qwen3"


def test_tiny_is_the_shipped_folder():
    assert Path(model_source("tiny")).parts[-2:] == ("data", "tiny")


def test_a_tokenizer_without_padding_gets_its_end_token(tmp_path):
    tokenizer = train_bpe(["some text"], 300, 64)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    loaded = load_tokenizer(BackboneConfig(model_name=str(tmp_path)))
    assert loaded.pad_token == loaded.eos_token is not None


def test_a_directory_that_is_no_model_says_so(tmp_path):
    with pytest.raises(
        BackboneError, match=r"backbone.model_name=.*: this directory holds no config.json, so no model"
    ):
        load_model(BackboneConfig(model_name=str(tmp_path)))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_path_that_does_not_exist_says_so(name):
    with pytest.raises(BackboneError, match="no such model directory"):
        load_model(BackboneConfig(model_name=name))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_name_without_network_says_what_to_do(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        BackboneError, match=r"nobody/nothing-at-all: the .* cannot be loaded.*check the name and the net"
    ):
        load(BackboneConfig(model_name="nobody/nothing-at-all"))


def test_weights_that_are_not_safetensors_are_never_unpickled(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="the model cannot be loaded"):
        load_model(BackboneConfig(model_name=str(tmp_path)))


def test_torn_weights_are_one_clear_error(folder, tmp_path):
    make_torn = tmp_path / "torn"
    make_torn.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (make_torn / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    with pytest.raises(BackboneError, match="the model cannot be loaded"):
        load_model(BackboneConfig(model_name=str(make_torn)))


def test_a_folder_without_tokenizer_gives_none(tmp_path):
    assert tokenizer_in(tmp_path) is None


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    train_bpe(["some text"], 300, 64).save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="the tokenizer cannot be loaded"):
        tokenizer_in(tmp_path)
    assert not marker.exists()


BROKEN = [
    ("config.json", b"[]", r"/config\.json: must "),
    ("config.json", b"[" * 5000, r"/config\.json: "),
    ("config.json", b'{"a": "\xff"}', r"/config\.json: .*UTF-8"),
    ("config.json", b'{"model_type": ["qwen3"]}', "cannot be loaded"),
    ("config.json", b'{"model_type": "qwen3", "num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000"),
    ("config.json", b'{"model_type": "qwen3", "hidden_size": "many"}', "cannot be loaded"),
    ("generation_config.json", b"7", r"/generation_config\.json: must "),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "which is no file of this folder"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_damaged_file_of_a_model_is_named(folder, tmp_path, name, content, message):
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    (broken / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message) as failed:
        load_model(BackboneConfig(model_name=str(broken)))
    assert str(broken) in str(failed.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"[]", r"/tokenizer_config\.json: must "),
        ("tokenizer_config.json", b'{"tokenizer_class": 7}', "cannot be loaded"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 5, "pad_token": [1]}', "cannot be loaded"),
        ("tokenizer.json", b"[]", "cannot be loaded"),
        ("tokenizer.json", b"[" * 5000, "cannot be loaded"),
        ("chat_template.jinja", b"\xff", r"/chat_template\.jinja: .*UTF-8"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_named(folder, tmp_path, name, content, message):
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    (broken / name).write_bytes(content)
    for load in (tokenizer_in, lambda place: load_tokenizer(BackboneConfig(model_name=str(place)))):
        with pytest.raises(BackboneError, match=message) as failed:
            load(broken)
        assert str(broken) in str(failed.value)


def test_what_a_library_says_of_a_damaged_file_is_shortened(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    content = json.loads((broken / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = "a" * 5000
    (broken / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BackboneError, match="the tokenizer cannot be loaded: .*aaa") as failed:
        tokenizer_in(broken)
    assert len(str(failed.value)) < 1000


@pytest.mark.parametrize("load", [load_model, load_tokenizer, bare_model])
def test_a_base_that_holds_a_peft_adapter_is_refused_with_what_to_do(folder, tmp_path, load):
    both = Path(shutil.copytree(folder, tmp_path / "model"))
    (both / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))
    with pytest.raises(BackboneError, match=r"it holds a PEFT adapter \(adapter_config.json\).*of a blend.*merge"):
        load(BackboneConfig(model_name=str(both)))


def test_a_name_on_the_hub_that_holds_a_peft_adapter_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(
        "transformers.utils.peft_utils.cached_file", lambda name, file, **_: str(tmp_path / "adapter_config.json")
    )
    with pytest.raises(BackboneError, match="name=some/adapter: .*it holds a PEFT adapter.*download both.*of a blend"):
        load_model(BackboneConfig(model_name="some/adapter"))


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "their/kernel"},
        {"text_config": {"attn_implementation": {"": "paged|their/kernel@main"}}},
        {"experts_implementation": "their/kernel"},
    ],
)
@pytest.mark.parametrize("load", [load_model, bare_model])
def test_a_kernel_that_a_model_names_is_neither_fetched_nor_run(folder, tmp_path, monkeypatch, change, load):
    asked = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: asked.append(1))
    theirs = Path(shutil.copytree(folder, tmp_path / "model"))
    content = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(BackboneError, match=r"config\.json: .*_implementation.* 'p?a?g?e?d?\|?their/kernel.*trust"):
        load(BackboneConfig(model_name=str(theirs)))
    assert not asked
    assert "their/kernel" in (would_run(str(theirs)) or "")


def test_a_pipe_among_the_files_of_a_model_is_refused_and_not_waited_for(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    (broken / "tokenizer.json").unlink()
    os.mkfifo(broken / "tokenizer.json")
    for load in (load_model, load_tokenizer):
        with pytest.raises(BackboneError, match=r"tokenizer\.json: is no ordinary file"):
            load(BackboneConfig(model_name=str(broken)))


def test_a_model_that_lacks_a_weight_is_not_filled_up_at_random(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="lack 1 weights, which would start at random; first model.layers.1.mlp.up"):
        load_model(BackboneConfig(model_name=str(folder)))
