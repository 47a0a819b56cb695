"""Adapters as the experts of a run whose routers alone train: the cheap path."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import read_adapter_config, read_tensors
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.injection.record import injected
from lmoe.peft.adapter import save_peft
from lmoe.rules.experts_from import experts_from_problems, source_router_problems
from lmoe.vocabulary import InitLora, InjectionStrategy, Mixing
from tests.tiny_models import randomise

CHEAP = ("injection.attn_lora.enabled=false", "injection.num_experts=3", "phase=routers")


@pytest.fixture
def adapters(micro, tmp_path):
    """Two, of rank 2 and 4."""
    folders = {}
    for name, rank in (("code", 2), ("math", 4)):
        model = AutoModelForCausalLM.from_pretrained(micro.model)
        lmoe.inject(model, {"strategy": "dense_lora", "lora_r": rank, "attn_lora": {"enabled": False}})
        randomise(model, seed=rank, std=0.1)
        folders[name] = save_peft(model, tmp_path / name, base_model=str(micro.model))
    return folders


def written(adapters) -> str:
    return "injection.experts_from={" + ",".join(f"{name}:{place}" for name, place in adapters.items()) + "}"


def test_only_the_routers_train_and_experts_keep_their_names_and_their_weights(train, adapters, micro):
    done = train(written(adapters), *CHEAP)
    assert done.code == 0, done.text
    assert f"expert 1 math: {adapters['math']}" in done.text and "random start" not in done.text
    tensors, path = read_tensors(done.run / "adapter"), "model.layers.1.mlp.up_proj"
    given = load_file(adapters["math"] / "adapter_model.safetensors")
    assert torch.equal(tensors[f"{path}.experts.1.lora_A"], given[f"base_model.model.{path}.lora_A.weight"])
    assert torch.equal(tensors[f"{path}.experts.1.lora_B"], given[f"base_model.model.{path}.lora_B.weight"])
    assert not tensors[f"{path}.experts.2.lora_B"].any(), "a new expert that never trains must add nothing"
    untrained = micro.parts(*CHEAP).model.get_submodule(path).router.weight
    assert not torch.equal(tensors[f"{path}.router.weight"], untrained)
    assert read_adapter_config(done.run / "adapter").expert_names == ["code", "math", "expert2"]
    assert json.loads((done.run / "report" / "summary.json").read_text())["expert_names"][0] == "code"
    assert "1 math" in done.out


def test_with_a_phase_that_trains_them_the_experts_go_on_learning(train, adapters):
    done = train(written(adapters), *CHEAP[:2], "phase=joint")
    assert done.code == 0, done.text
    tensors, path = read_tensors(done.run / "adapter"), "model.layers.1.mlp.up_proj"
    for expert, name in enumerate(adapters):
        given = load_file(adapters[name] / "adapter_model.safetensors")[f"base_model.model.{path}.lora_B.weight"]
        rank = given.shape[1]
        start, learnt = given * 4 / rank, tensors[f"{path}.experts.{expert}.lora_B"][:, :rank]  # alpha / r, folded in
        assert not torch.equal(learnt, start) and torch.allclose(learnt, start, atol=0.05)
    assert tensors[f"{path}.experts.2.lora_B"].any()


def test_experts_go_by_the_domains_that_they_are_named_after(micro, adapters):
    """The oracle's order is that of the adapters, not of the alphabet; a domain without an adapter has none."""
    named = {name: str(adapters["math"]) for name in ("words", "math", "code")}
    parts = micro.parts(written(named), *CHEAP[:2], "moe=oracle", "phase=joint")
    assert injected(parts.model).moe.domains == ["words", "math", "code"]


def problems(**settings) -> list[str]:
    return experts_from_problems(InjectionConfig(**settings))


TWO = {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"experts_from": 3}, "injection.experts_from is 3; allowed: {name: DIR, …}"),
        ({"experts_from": {}}, "names no adapter"),
        ({"experts_from": " "}, "is empty"),
        ({"experts_from": {"a": None}}, "injection.experts_from.a is None, must be a directory"),
        ({"experts_from": {"a b": "x"}}, "'a b' cannot be the name of an expert"),
        ({"experts_from": TWO, "num_experts": 1}, "room for 1 at a site; set injection.num_experts=2"),
        ({"experts_from": TWO, "num_experts_by_layer": [1, 4]}, r"set injection.num_experts_by_layer=[2, 4]"),
        ({"experts_from": TWO, "num_experts": 2, "lora_B_std": 0.1}, "injection.lora_B_std has no effect where every"),
        ({"experts_from": TWO, "shared_lora_A": True}, "set injection.shared_lora_A=false"),
        ({"experts_from": TWO, "init_lora": "svd"}, "so is injection.init_lora=svd"),
        ({"experts_from": TWO, "strategy": "moe_expert_lora"}, "moe_expert_lora has whole FFNs as experts"),
        ({"experts_from": "run", "num_experts_by_layer": [2, 4]}, "adds experts to every site alike"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_cure(settings, reason):
    kinds = {"init_lora": InitLora, "strategy": InjectionStrategy}
    found = problems(**{key: kinds[key](value) if key in kinds else value for key, value in settings.items()})
    assert len(found) == 1 and reason in found[0]
    assert problems(experts_from=TWO, num_experts=3, lora_B_std=0.1) == problems(experts_from="run") == []


def test_experts_that_are_kept_are_not_mixed_with_others_factor_by_factor(tmp_path):
    """Where lora_B of one expert meets lora_A of the others, one that adds nothing changes all."""
    factors, run = MoeConfig(mixing=Mixing.factors), str(tmp_path)
    moe = {"router": factors.router, "router_scope": factors.router_scope}
    (tmp_path / "lmoe_config.json").write_text(json.dumps({"injection": {"num_experts": 2}, "moe": moe}))
    (by_name,) = source_router_problems(InjectionConfig(experts_from=TWO), factors)
    assert "use moe.mixing=outputs" in by_name
    (grown,) = source_router_problems(InjectionConfig(experts_from=run, num_experts=3), factors)
    assert "train the run on with injection.num_experts=2" in grown
    assert source_router_problems(InjectionConfig(experts_from=run, num_experts=2), factors) == []
    assert source_router_problems(InjectionConfig(experts_from=run, num_experts=3), MoeConfig()) == []
