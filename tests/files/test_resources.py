"""Bases that backbone.model_name calls by a name of ours: found, missed, and called so again."""

import shutil
from pathlib import Path

import pytest

import lmoe
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError
from lmoe.files.resources import BASES, REAL_BASE, missing_base, name_of_base, named_base, resource_dir, stored_base
from lmoe.rules.backbone import backbone_problems
from lmoe.rules.trust import would_run
from tests.composing import compose


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that LMOE_REAL_BASE names."""
    monkeypatch.setenv("LMOE_REAL_BASE", str(tmp_path / "base"))
    return tmp_path / "base"


def test_the_tiny_base_and_the_real_one_have_names_and_no_other():
    assert list(BASES) == ["tiny", "smollm2_q4"]
    assert named_base("tiny") == resource_dir("data/tiny") and missing_base("tiny") is None
    assert named_base("somebody/model") is None and missing_base("somebody/model") is None


def test_the_real_base_lies_in_the_checkout_or_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("LMOE_REAL_BASE", raising=False)
    assert named_base(REAL_BASE) == resource_dir("data/real/smollm2_q4")
    monkeypatch.setenv("LMOE_REAL_BASE", str(tmp_path))
    assert named_base(REAL_BASE) == tmp_path


def test_a_real_base_that_is_not_there_says_what_writes_it(elsewhere):
    config = BackboneConfig(model_name=REAL_BASE)
    [problem] = backbone_problems(config)
    assert problem.startswith(f"backbone.model_name=smollm2_q4: {elsewhere} holds no model; run `make real-base`")
    for load in (load_model, load_tokenizer):
        with pytest.raises(BackboneError, match=r"run `make real-base`.*LMOE_REAL_BASE"):
            load(config)


def test_a_base_is_called_by_its_name_in_what_is_saved(elsewhere, micro, tmp_path):
    shutil.copytree(micro.model, elsewhere)
    assert backbone_problems(BackboneConfig(model_name=REAL_BASE)) == []
    assert would_run(REAL_BASE) is None
    model = load_model(BackboneConfig(model_name=REAL_BASE))
    assert name_of_base(str(model.name_or_path)) == REAL_BASE
    lmoe.inject(model, injection={"lora_r": 2, "num_experts": 2})
    lmoe.save(model, tmp_path / "adapter")
    shutil.move(elsewhere, tmp_path / "moved")
    with pytest.raises(BackboneError, match="run `make real-base`"):
        lmoe.load(tmp_path / "adapter")
    shutil.move(tmp_path / "moved", elsewhere)
    assert name_of_base(str(lmoe.load(tmp_path / "adapter")[0].name_or_path)) == REAL_BASE


def test_files_name_a_folder_by_its_absolute_path_and_everything_else_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("models/qwen", "tiny"):
        (tmp_path / folder).mkdir(parents=True)
    for typed in ("models/qwen", "./models/qwen/", "models/../models/qwen", "~/models/qwen"):
        assert stored_base(typed) == str(tmp_path / "models" / "qwen")
    for name in ("tiny", REAL_BASE, "Qwen/Qwen3-0.6B", "models/gone", ""):
        assert stored_base(name) == name


def test_the_hubs_weights_and_those_that_went_through_four_bits_are_two_choices(restored):
    from lmoe.config.run import RunConfig

    names = {choice: compose("train", RunConfig, [f"backbone={choice}"]).backbone for choice in ("smollm2", REAL_BASE)}
    assert names["smollm2"].model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert names[REAL_BASE].model_name == REAL_BASE
    assert {backbone.precision for backbone in names.values()} == {"bfloat16"}
