"""Whole runs of each strategy: they learn, log what is documented, and load and generate as they ended."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import lmoe
from lmoe.adapter.folder import adapter_tensors, read_adapter_config
from lmoe.cli.main import app
from lmoe.errors import ConfigError
from lmoe.injection.tracing import adapters_off, domain
from lmoe.run.parts import check_roles
from lmoe.vocabulary import InjectionStrategy
from tests.conftest import process_state
from tests.metric_names import names, rows, undocumented
from tests.micro import WARM_UP
from tests.run.ended import FAST, keep_model, logits

RUNS = {
    "dense_lora": ("model", "injection=dense_lora", "phase=adapters"),
    "mixture_lora beside native blocks": ("native", "injection=mixture_lora", "phase=joint"),
    "moe_expert_lora": ("model", "injection=moe_expert_lora", "phase=joint"),
    "moe_expert_lora with copies": ("model", "injection=moe_expert_lora", "injection.share_base=false", "phase=joint"),
    "native_moe_expert_lora": ("native", "injection=native_moe_expert_lora", "phase=joint"),
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A finished run.

    Args:
        name: in the table of runs.
        folder: its run directory.
        base: of its backbone.
        model: as it was when it was saved, in evaluation mode.
    """

    name: str
    folder: Path
    base: Path
    model: PreTrainedModel

    @property
    def strategy(self) -> str:
        return self.name.split()[0]


@pytest.fixture(scope="module", params=RUNS)
def ended(request: pytest.FixtureRequest, micro, tmp_path_factory) -> Ended:
    from lmoe.cli.train import main

    backbone, *overrides = RUNS[request.param]
    folder, base = tmp_path_factory.mktemp("strategy"), getattr(micro, backbone)
    with process_state(folder) as patch:
        kept = keep_model(patch)
        given = micro.changed(f"backbone.model_name={base}", *overrides, *FAST)
        assert main([*given, f"hydra.run.dir={folder / 'run'}"]) == 0
    return Ended(name=request.param, folder=folder / "run", base=base, model=kept[0].eval())


def test_the_table_has_every_strategy():
    missing = set(InjectionStrategy) - {name.split()[0] for name in RUNS}
    assert not missing, f"tests/run/test_strategies.py: RUNS has no run of {', '.join(sorted(missing))}"


def test_the_loss_falls_in_every_domain_and_the_first_row_is_the_backbones(ended):
    first, *_, last = rows(ended.folder)
    assert (first["step"], last["step"]) == (0, 6)
    losses = [name for name in first if name.startswith("val/") and name.endswith("loss")]
    assert len(losses) == 4
    for name in losses:
        assert last[name] < first[name] - 0.02, name


def test_what_is_logged_is_documented_and_routing_is_that_of_the_routers_there_are(ended):
    logged = names(ended.folder)
    assert undocumented(logged) == []
    about_routers = {name for name in logged if "routing" in name or "load_balancing" in name or "z_loss" in name}
    routers = {
        "dense_lora": set(),
        "mixture_lora": {"model.layers.0.mlp", "model.layers.1.mlp"},
        "moe_expert_lora": {"model.layers.0.mlp", "model.layers.1.mlp"},
        "native_moe_expert_lora": {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"},
    }[ended.strategy]
    assert {name.split("/")[1] for name in logged if name.startswith("routing/model.")} == routers
    assert bool(about_routers) is bool(routers)
    assert {"lr/router", "grad_norm/router"}.issubset(logged) is bool(routers)
    assert {"lr/lora", "lr/attn_lora", "grad_norm/lora", "grad_norm/attn_lora"} <= set(logged)
    last = rows(ended.folder)[-1]
    for site in routers:
        assert sum(last[f"routing/{site}/load/{expert}"] for expert in range(4)) == pytest.approx(1)


def test_the_loaded_run_gives_its_logits_bitwise_and_without_adapters_those_of_the_backbone(ended):
    model, _ = lmoe.load(ended.folder)
    assert torch.equal(logits(model), logits(ended.model))
    base = AutoModelForCausalLM.from_pretrained(ended.base).eval()
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
    assert not torch.allclose(logits(model), logits(base), atol=0.01)


def test_the_adapter_holds_no_weights_of_the_backbone(ended):
    config = read_adapter_config(ended.folder / "adapter")
    assert config.trained_base == [] and config.injection["strategy"] == ended.strategy
    stored = adapter_tensors(ended.model)
    assert not any(".base_layer." in name or ".base_copies." in name for name in stored)
    kinds = {name.rsplit(".", 1)[-1] for name in stored}
    assert kinds == {"lora_A", "lora_B"} | (set() if ended.strategy == "dense_lora" else {"weight"})
    assert all("router" in name for name in stored if name.endswith(".weight"))


def test_a_loaded_run_generates_with_and_without_cache_what_the_run_would_have(ended):
    model, tokenizer = lmoe.load(ended.folder)
    prompt = tokenizer("math 3: say", return_tensors="pt")
    settings = {"max_new_tokens": 5, "do_sample": False}
    written = model.generate(**prompt, **settings)
    assert torch.equal(written, model.generate(**prompt, **settings, use_cache=False))
    assert torch.equal(written, ended.model.generate(**prompt, **settings))
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_the_command_line_generates_from_the_run(ended, restored):
    asked = ["generate", "--checkpoint", str(ended.folder), "--prompt", "code 1: say", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and done.stdout.strip()


@pytest.mark.parametrize("name", ["dense_lora", "moe_expert_lora with copies", "native_moe_expert_lora"])
def test_preflight_finds_a_gradient_for_every_parameter_that_trains(train, micro, name):
    backbone, *overrides = RUNS[name]
    done = train("dry_run=preflight", f"backbone.model_name={getattr(micro, backbone)}", *overrides)
    assert done.code == 0, done.text
    assert "preflight: ready" in done.text and "got no gradient" not in done.text


@pytest.mark.parametrize("name", ["moe_expert_lora", "native_moe_expert_lora"])
def test_experts_are_silenced_one_at_a_time_at_the_end_where_that_is_asked_for(train, micro, name):
    backbone, *overrides = RUNS[name]
    short = ("analysis.knock_out=experts", "trainer.max_steps=2")
    done = train(f"backbone.model_name={getattr(micro, backbone)}", *overrides, *short)
    assert done.code == 0, done.text
    last = rows(done.run)[-1]
    changes = {name: value for name, value in last.items() if name.startswith("val/routing/knock_out/")}
    assert len(changes) == 4 * 3
    assert any(abs(value) > 1e-4 for value in changes.values())


@pytest.mark.parametrize(("name", "phase"), [("dense_lora", "adapters"), ("native_moe_expert_lora", "joint")])
def test_a_strategy_without_routers_of_its_own_brings_the_phases_that_suit_it(train, micro, name, phase):
    """Without a phase group on the command line, whose default warms routers up."""
    given = micro.changed(f"backbone.model_name={getattr(micro, RUNS[name][0])}", f"injection={name}")
    done = train("dry_run=preflight", *(o for o in given if o != WARM_UP), settings=False)
    assert done.code == 0, done.text
    assert f"phase {phase}: steps 1 to 6 train attn_lora, lora" in done.text


LESS_USUAL = {
    "no branches on the experts": (
        "native",
        "injection=native_moe_expert_lora",
        "injection.target_keywords=[q_proj]",
        "injection.attn_lora.enabled=false",
    ),
    "one fused weight and diversity": (
        "native",
        "injection=native_moe_expert_lora",
        "injection.target_keywords=[down_proj]",
        "moe.diversity_coef=0.1",
        "moe.load_balance.scope=global_batch",
    ),
    "selection bias": ("model", "injection=moe_expert_lora", "moe=sigmoid", "phase=joint"),
    "diversity": ("model", "injection=moe_expert_lora", "moe=soft", "phase=joint", "moe.diversity_coef=0.1"),
    "one decision a prompt": ("model", "injection=moe_expert_lora", "moe=sequence", "phase=joint"),
    "oracle": ("model", "injection=moe_expert_lora", "moe=oracle", "phase=joint"),
    "attention alone": ("model", "injection=dense_lora", "injection.target_keywords=[]", "phase=adapters"),
    "DoRA": ("model", "injection=dense_lora", "injection.attn_lora.use_dora=true", "phase=adapters"),
}


@pytest.mark.parametrize("case", LESS_USUAL)
def test_less_usual_settings_run_validate_and_load(train, micro, monkeypatch, case):
    backbone, *overrides = LESS_USUAL[case]
    kept = keep_model(monkeypatch)
    given = micro.changed(f"backbone.model_name={getattr(micro, backbone)}", *overrides, "trainer.max_steps=2", *FAST)
    done = train(*(o for o in given if o != WARM_UP), "trainer.val_every_n_steps=1", settings=False)
    assert done.code == 0, done.text
    assert undocumented(names(done.run)) == []
    model, _ = lmoe.load(done.run)
    with nullcontext() if case != "oracle" else domain(model, "math"):
        loaded = logits(model)
    with nullcontext() if case != "oracle" else domain(kept[0], "math"):
        assert torch.equal(loaded, logits(kept[0].eval()))


def test_a_head_that_is_tied_to_the_embeddings_cannot_train(micro, restored):
    with pytest.raises(ConfigError, match="trains head, of which .* no parameters: it shares its weights"):
        micro.parts("phase=joint", "phase.phases.joint.trainable=[lora,head]")


def test_a_head_that_the_backbone_does_not_name_is_not_said_to_be_tied(micro, restored, monkeypatch):
    model = micro.parts("phase=joint").model
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    config = micro.config("phase=joint", "phase.phases.joint.trainable=[lora,head]")
    with pytest.raises(ConfigError, match="trains head, of which this backbone has no parameters; leave it out"):
        check_roles(config, model)
