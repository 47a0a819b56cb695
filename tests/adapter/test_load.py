"""lmoe.load and lmoe.save: from a run or an adapter back to the same model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE
from lmoe.errors import BackboneError, CheckpointError, ConfigError, LmoeError
from tests.tiny_models import randomise, tiny_model, tokens


def edited(adapter: Path, target: Path, change) -> Path:
    """A copy of an adapter whose config was changed."""
    shutil.copytree(adapter, target)
    raw = json.loads((target / CONFIG_FILE).read_text())
    change(raw)
    (target / CONFIG_FILE).write_text(json.dumps(raw))
    return target


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_a_run_and_an_adapter_directory_give_the_saved_model_bitwise(trained, what):
    model, tokenizer = lmoe.load(getattr(trained, what))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(tokens()).logits, trained.model.eval()(tokens()).logits)
    assert tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert tokenizer.chat_template == trained.tokenizer.chat_template


def test_an_adapter_without_tokenizer_takes_that_of_the_base(trained, tmp_path):
    lmoe.save(trained.model, tmp_path / "bare")
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]
    _, tokenizer = lmoe.load(str(tmp_path / "bare"))
    assert tokenizer.get_vocab() == trained.tokenizer.get_vocab()


def test_what_was_loaded_saves_the_same_weights_again(trained, tmp_path):
    model, _ = lmoe.load(trained.run)
    lmoe.save(model, tmp_path / "again")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (trained.adapter / name).read_bytes()


def test_a_precision_is_given_by_its_name_and_others_are_named(trained):
    model, _ = lmoe.load(trained.run, precision="bfloat16")
    assert model.dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="`precision=fp8`: allowed: .*bfloat16"):
        lmoe.load(trained.run, precision="fp8")


def test_base_model_takes_the_place_of_the_recorded_base(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained.base, moved)
    gone = edited(trained.adapter, tmp_path / "adapter", lambda c: c["base_model"].update(name="/gone", revision="v9"))
    with pytest.raises(BackboneError, match="^/gone: no such model directory"):
        lmoe.load(gone)
    model, _ = lmoe.load(gone, base_model=str(moved))
    assert torch.equal(model(tokens()).logits, trained.model.eval()(tokens()).logits)


def test_a_base_with_other_weights_is_refused(trained, tmp_path):
    tiny_model(vocab_size=300, max_position_embeddings=96, seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="trained on another base"):
        lmoe.load(trained.run, base_model=str(tmp_path / "other"))


def test_a_base_without_place_for_the_experts_is_refused_by_the_name_of_the_file(trained, tmp_path):
    tiny_model("phi", vocab_size=300).save_pretrained(tmp_path / "phi")
    given = edited(
        trained.adapter, tmp_path / "adapter", lambda c: c["injection"].update(target_keywords=["gate_proj"])
    )
    with pytest.raises(CheckpointError, match=f"{CONFIG_FILE} does not fit the base .*'gate_proj' matches nothing"):
        lmoe.load(given, base_model=str(tmp_path / "phi"))


def test_a_model_built_from_a_config_asks_for_its_base(trained, tmp_path):
    model = tiny_model()
    lmoe.inject(model)
    lmoe.save(model, tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="the adapter does not name its base; give `base_model`"):
        lmoe.load(tmp_path / "nameless")


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(CheckpointError, match=r"the run has not finished: resume=<run> continues it"):
        lmoe.load(tmp_path)


def test_a_path_that_is_neither_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="neither a finished run nor an adapter: no lmoe_config.json$"):
        lmoe.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such run or adapter directory"):
        lmoe.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["injection"].update(_target_="os.system"),
        lambda c: c["moe"].update(load_balance={"_target_": "os.system", "command": "touch ran"}),
        lambda c: c["injection"].update(target_keywords=["${oc.env:HOME}"]),
        lambda c: c["injection"].update(strategy="os.system"),
        lambda c: c["injection"].update(lora_r="__import__('os')"),
        lambda c: c["base_model"].update(name="../../../../etc"),
        lambda c: c["base_model"].update(name="/etc/passwd"),
        lambda c: c["base_model"].update(precision="load"),
        lambda c: c["injection"].update(lora_r=-1),
        lambda c: c["injection"].update(lora_r=None),
    ],
)
def test_a_hostile_config_is_refused_with_one_of_our_errors(trained, tmp_path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = edited(trained.adapter, tmp_path / "adapter", change)
    with pytest.raises(LmoeError):
        lmoe.load(given)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_base_is_not_run_because_an_adapter_names_it(trained, tmp_path):
    """Only the call itself gives trust, and it is told what would run."""
    base, marker = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(trained.base, base)
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n"
    (base / "evil.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (base / "config.json").write_text(json.dumps(config))
    given = edited(
        trained.adapter,
        tmp_path / "adapter",
        lambda c: c["base_model"].update(name=str(base), trust_remote_code=True),
    )
    with pytest.raises(CheckpointError, match=r"base_model.trust_remote_code is true: evil.Evil .*base/config.json"):
        lmoe.load(given)
    with pytest.raises(BackboneError, match="where you trust its code, say so: `trust_remote_code=True`"):
        lmoe.load(given, base_model=str(base))
    assert not marker.exists()
    with pytest.raises(BackboneError):  # a class that is no model
        lmoe.load(given, trust_remote_code=True)
    assert marker.exists()


def test_a_base_that_is_not_there_is_named_with_the_file_that_names_it(trained, tmp_path):
    given = edited(trained.adapter, tmp_path / "adapter", lambda c: c["base_model"].update(name=str(tmp_path / "gone")))
    with pytest.raises(
        BackboneError, match=r"gone: no such .*adapter/lmoe_config\.json names; `base_model` names another"
    ):
        lmoe.load(given)
    with pytest.raises(BackboneError, match="no such model directory$"):
        lmoe.load(given, base_model=str(tmp_path / "gone"))


# --- a config that is lost


def test_weights_without_config_give_the_average_on_a_base_that_is_named_and_with_a_warning(trained, tmp_path):
    """Under a router that weighs every expert alike the average of the experts is the mixture."""
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3}, {"router": "uniform"})
    randomise(model, std=0.2)
    lmoe.save(model, tmp_path / "lost", tokenizer=trained.tokenizer)
    (tmp_path / "lost" / CONFIG_FILE).unlink()
    for given in ({}, {"base_model": str(trained.base), "average_without_config": False}):
        with pytest.raises(CheckpointError, match=r"restore it, or name the base \(`base_model`\)"):
            lmoe.load(tmp_path / "lost", **given)
    with pytest.warns(UserWarning, match="no router decides, 10 Linears have the average .* lora_alpha=32 is a guess"):
        averaged, _ = lmoe.load(tmp_path / "lost", base_model=str(trained.base))
    with torch.no_grad():
        torch.testing.assert_close(averaged(tokens()).logits, model.eval()(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_an_average_leaves_out_the_router_of_a_whole_model(trained, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3}, {"router": "sequence", "router_scope": "model"})
    lmoe.save(model, tmp_path / "lost", tokenizer=trained.tokenizer)
    (tmp_path / "lost" / CONFIG_FILE).unlink()
    with pytest.warns(UserWarning, match="no router decides, 10 Linears have the average"):
        lmoe.load(tmp_path / "lost", base_model=str(trained.base))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("model.layers.0.mlp.up_proj.lora_magnitude", "what .*lora_magnitude does cannot be known"),
        ("model.layers.0.mlp.up_proj.experts.0.lora_A_start", "what .*lora_A_start does cannot be known"),
        ("model.layers.7.mlp.up_proj.lora_A", "do not belong together"),
    ],
)
def test_what_an_average_cannot_explain_is_refused(trained, tmp_path, key, reason):
    shutil.copytree(trained.adapter, tmp_path / "lost")
    (tmp_path / "lost" / CONFIG_FILE).unlink()
    tensors = load_file(tmp_path / "lost" / WEIGHTS_FILE)
    save_file(tensors | {key: torch.zeros(4, 4)}, tmp_path / "lost" / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=reason):
        lmoe.load(tmp_path / "lost", base_model=str(trained.base))


# --- files that ask for more than they hold


@pytest.mark.parametrize(
    "change",
    [{"lora_r": 5_000_000}, {"num_experts": 3_000_000}, {"shared_lora_r": 5_000_000}],
    ids=lambda change: next(iter(change)),
)
def test_sizes_beyond_the_file_are_refused_before_memory_is_taken(trained, tmp_path, change, monkeypatch):
    given = edited(trained.adapter, tmp_path / "adapter", lambda c: c["injection"].update(change))
    monkeypatch.setattr("lmoe.adapter.load.inject", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match="they do not belong together|must be"):
        lmoe.load(given)


def test_a_config_that_is_too_large_or_no_file_is_refused(trained, tmp_path):
    shutil.copytree(trained.adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / CONFIG_FILE
    config.write_text(" " * 5_000_000 + config.read_text())
    with pytest.raises(CheckpointError, match="a config has at most"):
        lmoe.load(tmp_path / "adapter")
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match="is no ordinary file"):
        lmoe.load(tmp_path / "adapter")
