"""A run trains on, on other rows: it starts as the other one ended, nothing is kept, and what differs is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmoe
from lmoe.adapter.folder import read_adapter_config, read_tensors
from lmoe.evaluate.val_loss import val_loss, validation_rows
from lmoe.injection.kept import kept_rows
from lmoe.injection.record import injected
from tests.micro import write_rows

OTHERS = ("injection=dense_lora", "injection=moe_expert_lora", "injection=native_moe_expert_lora")


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "rows"
    write_rows(folder, rows=6, first=50)
    return folder


def base_of(micro, strategy: str) -> tuple[str, ...]:
    return (strategy, f"backbone.model_name={micro.native}") if "native" in strategy else (strategy,)


@pytest.fixture
def ids():
    return torch.randint(4, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def test_it_starts_as_the_other_run_ended_and_nothing_is_kept(micro, finished_run, other_rows, ids):
    parts = micro.parts(f"injection.experts_from={finished_run}", f"data.path={other_rows}")
    old, tokenizer = lmoe.load(finished_run)
    with torch.no_grad():
        assert torch.equal(parts.model.eval()(ids).logits, old(ids).logits)
    rows = validation_rows(str(micro.val), finished_run, old, tokenizer)
    assert val_loss(parts.model, tokenizer, rows) == val_loss(old, tokenizer, rows)
    assert kept_rows(parts.model) == {} and injected(parts.model).kept_experts == 0
    assert parts.warnings == []


def test_all_of_it_trains_on_and_one_that_was_interrupted_ends_like_one_that_was_not(
    train, own_run, other_rows, tmp_path
):
    settings = (
        f"injection.experts_from={own_run}",
        f"data.path={other_rows}",
        "phase=joint",
        "optim.schedule=constant",
    )
    full = train(*settings, "trainer.max_steps=4", run="full")
    half = train(*settings, "trainer.max_steps=2", run="half")
    assert full.code == half.code == 0, full.text + half.text
    assert f"goes on from {own_run}, with all that it has learnt" in full.text
    before, expected = read_tensors(own_run / "adapter"), read_tensors(full.run / "adapter")
    assert before.keys() == expected.keys()
    assert not any(torch.equal(before[name], tensor) for name, tensor in expected.items())
    shutil.rmtree(own_run)  # what it had is in the checkpoint
    done = train(f"resume={half.run}", "trainer.max_steps=4", settings=False)
    assert done.code == 0, done.text
    resumed = read_tensors(half.run / "adapter")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("strategy", OTHERS)
def test_runs_of_every_strategy_train_on(train, micro, tmp_path, strategy, ids):
    short = (*base_of(micro, strategy), "phase=joint", "trainer.max_steps=2")
    if strategy == OTHERS[0]:
        short = (strategy, "phase=adapters", "trainer.max_steps=2")
    done = train(*short)
    assert done.code == 0, done.text
    parts = micro.parts(*short, f"injection.experts_from={done.run}")
    old, _ = lmoe.load(done.run)
    with torch.no_grad():
        assert torch.equal(parts.model.eval()(ids).logits, old(ids).logits)
    assert any(tensor.any() for name, tensor in read_tensors(done.run / "adapter").items() if name.endswith("lora_B"))


def test_names_of_experts_and_numbers_of_experts_by_layer_go_along(micro, tmp_path):
    settings = ("injection.num_experts_by_layer=[2,3]", "phase=joint")
    parts = micro.parts(*settings)
    lmoe.save(parts.model, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "lmoe_config.json").read_text())
    config["expert_names"] = ["code", "math", "words"]
    (tmp_path / "old" / "lmoe_config.json").write_text(json.dumps(config))
    again = micro.parts(*settings, f"injection.experts_from={tmp_path / 'old'}")
    assert injected(again.model).expert_names == ("code", "math", "words")
    assert read_adapter_config(tmp_path / "old").expert_names == ["code", "math", "words"]


def test_a_phase_may_train_the_backbone_from_here_on(micro, finished_run):
    phase = "phase.phases.joint.trainable=[router,lora,attn_lora,base_ffn]"
    parts = micro.parts(f"injection.experts_from={finished_run}", "phase=joint", phase)
    stored = read_tensors(finished_run / "adapter")
    name = "model.layers.0.mlp.up_proj.experts.1.lora_B"
    assert torch.equal(parts.model.get_submodule(name.partition(".experts")[0]).lora_B[1], stored[name])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("injection.lora_r=8", "injection.top_k=1"), "other settings; set injection.lora_r=4 injection.top_k=2"),
        (("moe=soft",), "other routers, which go on with it; set moe=top_k"),
        (("moe.temperature=2", "moe.temperature_end=1"), "other settings; set moe.temperature=1.0"),
        (("injection.num_experts=3",), "leaves no room for them; set it to 4 to train them on"),
        (
            ("injection=dense_lora", "phase=adapters"),
            "needs injection=mixture_lora; injection=dense_lora has no experts",
        ),
        (("injection=moe_expert_lora",), "needs injection=mixture_lora; injection=moe_expert_lora has whole FFNs"),
        (("injection.lora_B_std=0.5",), "injection.lora_B_std has no effect where every expert comes from"),
        (("backbone.model_name={other}",), "was trained on another base"),
        (("phase=grow",), "adds none; set it to at least 5, or use another phase, such as phase=joint"),
    ],
)
def test_what_cannot_train_on_is_refused_with_what_differs(train, finished_run, micro, tmp_path, overrides, reason):
    if "{other}" in overrides[0]:
        other = shutil.copytree(micro.model, tmp_path / "other")
        _change_a_weight(other)
        overrides = (overrides[0].format(other=other),)
    done = train(f"injection.experts_from={finished_run}", "dry_run=preflight", *overrides)
    assert done.code == 1
    assert reason in done.text


def test_a_run_of_dense_lora_is_no_mixture_and_says_how_it_becomes_an_expert(train, micro, tmp_path):
    parts = micro.parts("injection=dense_lora", "phase=adapters")
    lmoe.save(parts.model, tmp_path / "dense")
    done = train(f"injection.experts_from={tmp_path / 'dense'}", "dry_run=preflight")
    assert done.code == 1
    assert (
        "set injection=dense_lora to train it on, or name it as an expert: injection.experts_from={name:" in done.text
    )


def _change_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
