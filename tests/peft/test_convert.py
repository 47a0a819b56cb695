"""A checkpoint laid out as EulerForge 0.1 lays it out becomes an adapter with the same function."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.adapter.folder import adapter_tensors, read_tensors
from lmoe.errors import BackboneError, CheckpointError
from lmoe.injection.roles import adapter_parameters
from lmoe.peft.convert import convert_eulerforge
from tests.tiny_models import randomise, tokens

INJECTION = {"strategy": "mixture_lora", "num_experts": 3, "top_k": 1, "lora_r": 4, "lora_alpha": 6.0}


def mixture(base: Path):
    """With a router bias and, for its one expert a token, a weight of exactly 1: what that trainer has."""
    model = AutoModelForCausalLM.from_pretrained(base)
    lmoe.inject(model, INJECTION, {"router_bias": True, "scale": "unit"})
    randomise(model, std=0.2)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("router.bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def run_directory(folder: Path, model, base: Path, **config) -> Path:
    """resolved_config.json, and in `final` the backbone with routers and branches under that trainer's names."""
    (folder / "final").mkdir(parents=True)
    tensors = {}
    for name, tensor in adapter_tensors(model).items():
        leaf = name.replace("lora_", "lora") if ".experts." in name else name
        tensors[leaf] = tensor.clone().contiguous()
    own = AutoModelForCausalLM.from_pretrained(base).state_dict()
    wrapped = {name.rpartition(".lora_A")[0] for name in tensors if name.endswith(".lora_A")}
    wrapped |= {name.removesuffix(".router.weight") for name in tensors if name.endswith(".router.weight")}
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{path}.base_layer.{leaf}" if path in wrapped else name] = tensor.clone()
    save_file(tensors, folder / "final" / "model.safetensors")
    stated = {"model_name": str(base), "injection": INJECTION} | config
    (folder / "resolved_config.json").write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("place", ["run", "checkpoint", "pickled"])
def test_routers_with_their_bias_and_experts_come_over_bitwise(trained, tmp_path, place):
    model = mixture(trained.base)
    run = run_directory(tmp_path / "run", model, trained.base)
    if place == "pickled":
        weights = run / "final" / "model.safetensors"
        torch.save(load_file(weights), run / "final" / "pytorch_model.bin")
        weights.unlink()
    folder = convert_eulerforge(run / "final" if place == "checkpoint" else run, tmp_path / "out")
    loaded, _ = lmoe.load(folder)
    assert all(torch.equal(read_tensors(folder)[name], t) for name, t in adapter_tensors(model).items())
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_the_tokenizer_and_template_that_lie_in_the_checkpoint_come_over(trained, tmp_path):
    run = run_directory(tmp_path / "run", mixture(trained.base), trained.base)
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    tokenizer.chat_template = "{#- its own -#}" + tokenizer.chat_template
    tokenizer.save_pretrained(run / "final")
    _, found = lmoe.load(convert_eulerforge(run, tmp_path / "out"))
    assert found.chat_template == tokenizer.chat_template != trained.tokenizer.chat_template


def without_bias(tensors):
    return {name: t for name, t in tensors.items() if name != "model.layers.0.mlp.up_proj.router.bias"}


def trained_backbone(tensors):
    return tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (dict, {"injection": INJECTION | {"strategy": "moe_expert_lora"}}, "mixture_lora is what can be converted"),
        (dict, {"injection": INJECTION | {"lora_r": "4"}}, "injection.lora_r is '4', no number"),
        (dict, {"injection": INJECTION | {"lora_r": 5}}, r"experts.0.lora_A has shape \(4, 48\), expected \(5, 48\)"),
        (dict, {"model_name": None}, "does not name the base; give `base_model`"),
        (without_bias, {}, "no tensor for model.layers.0.mlp.up_proj.router.bias"),
        (trained_backbone, {}, "model.norm.weight is not that of the base: it was trained too"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused_by_name(trained, tmp_path, change, config, reason):
    run = run_directory(tmp_path / "run", mixture(trained.base), trained.base, **config)
    weights = run / "final" / "model.safetensors"
    save_file(change(load_file(weights)), weights)
    with pytest.raises(CheckpointError, match=reason):
        convert_eulerforge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_named_with_the_config_that_names_it(trained, tmp_path):
    run = run_directory(tmp_path / "run", mixture(trained.base), trained.base, model_name="./gone")
    with pytest.raises(BackboneError, match=r"^\./gone: no such .*run/resolved_config\.json names; `base_model`"):
        convert_eulerforge(run, tmp_path / "out")


def test_a_pickle_that_would_run_code_and_a_folder_without_config_are_refused(trained, tmp_path):
    run = run_directory(tmp_path / "run", mixture(trained.base), trained.base)
    (run / "final" / "model.safetensors").unlink()
    torch.save({"x": Path("a")}, run / "final" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_eulerforge(run, tmp_path / "out")
    (run / "resolved_config.json").unlink()
    with pytest.raises(CheckpointError, match="no resolved_config.json there or above it"):
        convert_eulerforge(run, tmp_path / "out")
