"""Every dense family: nothing changes at the start, everything trains, and saving, caching and checkpointing agree."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.checkpoint.adapter import load_adapter, read_adapter_config, save_adapter
from lmoe.injection.apply import adapters_off, injected
from lmoe.injection.roles import adapter_parameters
from tests.tiny_models import DENSE_FAMILIES, randomise, tiny_model, tokens

INJECTION = {"lora_r": 4, "lora_dropout": 0.0}
EXPECTED_FFN = {"phi": {"fc1", "fc2"}, "phi3": {"gate_up_proj", "down_proj"}, "glm4": {"gate_up_proj", "down_proj"}}
EXPECTED_ATTENTION = {"phi3": {"qkv_proj"}}


class Family:
    """A backbone's own logits, and the same model injected with random adapters and routers."""

    def __init__(self, name: str) -> None:
        self.name, self.ids = name, tokens()
        base = tiny_model(name)
        self.model = copy.deepcopy(base)
        self.plan = lmoe.inject(self.model, injection=INJECTION)
        with torch.no_grad():
            self.base_logits = base(self.ids).logits
            self.fresh_logits = self.model(self.ids).logits
        randomise(self.model, std=0.1)


@pytest.fixture(scope="module", params=DENSE_FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def gradients(model: PreTrainedModel, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss with the auxiliary loss, and the gradients of all adapters and routers."""
    model.zero_grad()
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss + 10 * trace.auxiliary_loss()
        assert len(trace.routing) == sum(1 for site in injected(model).plan.sites if site.num_experts)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in adapter_parameters(model).items() if p.grad is not None}


def test_the_linears_of_the_family_are_found(family):
    mixtures = {site.path.rsplit(".", 1)[-1] for site in family.plan.sites if site.num_experts}
    singles = {site.path.rsplit(".", 1)[-1] for site in family.plan.sites if not site.num_experts}
    assert mixtures == EXPECTED_FFN.get(family.name, {"gate_proj", "up_proj", "down_proj"})
    assert singles == EXPECTED_ATTENTION.get(family.name, {"q_proj", "v_proj"})
    assert family.plan.warnings == ()


def test_zero_lora_B_gives_the_backbones_logits_bitwise(family):
    assert torch.equal(family.fresh_logits, family.base_logits)


def test_adapters_off_gives_the_backbones_logits_bitwise(family):
    with torch.no_grad():
        assert not torch.allclose(family.model(family.ids).logits, family.base_logits, atol=1e-3)
        with adapters_off(family.model):
            assert torch.equal(family.model(family.ids).logits, family.base_logits)


def test_every_planned_parameter_gets_a_gradient_and_the_backbone_none(family):
    _, found = gradients(family.model.train(), family.ids)
    family.model.eval()
    assert found.keys() == adapter_parameters(family.model).keys()
    assert all(gradient.any() for gradient in found.values())
    assert all(p.grad is None for name, p in family.model.named_parameters() if name not in found)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients_routers_included(family):
    twin = copy.deepcopy(family.model).train()
    loss, plain = gradients(twin, family.ids)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    twin.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    checkpointed_loss, checkpointed = gradients(twin, family.ids)
    assert checkpointed_loss == pytest.approx(loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_saved_and_loaded_adapters_give_the_same_logits_bitwise(family, tmp_path: Path):
    save_adapter(family.model, tmp_path, {"name": family.name, "revision": None, "precision": "float32"})
    config = read_adapter_config(tmp_path)
    fresh = tiny_model(family.name)
    lmoe.inject(fresh, config.injection, config.moe)
    load_adapter(fresh, tmp_path, config)
    with torch.no_grad():
        assert torch.equal(fresh(family.ids).logits, family.model(family.ids).logits)


def test_generating_with_a_cache_gives_the_tokens_of_generating_without(family):
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    cached = family.model.generate(family.ids[:1, :5], use_cache=True, **settings)
    assert torch.equal(cached, family.model.generate(family.ids[:1, :5], use_cache=False, **settings))
    assert cached.shape[1] > 5
