"""The fingerprint follows the base's weights, and nothing else."""

import itertools
from dataclasses import replace

import pytest
import torch

import lmoe
from lmoe.backbones.fingerprint import base_fingerprint, fingerprint
from lmoe.injection.backbone_state import backbone_fingerprint
from lmoe.injection.record import injected
from tests.tiny_models import randomise, tiny_model


def test_an_injected_model_remembers_that_of_its_base_whatever_is_trained():
    model = tiny_model()
    before = fingerprint(model)
    lmoe.inject(model, injection={"lora_B_std": 0.1}, trained_base=["base_ffn"])
    randomise(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.5)
    assert injected(model).fingerprint == before


def test_a_model_on_the_meta_device_has_one_of_names_and_shapes():
    with torch.device("meta"):
        prints = {fingerprint(tiny_model()), fingerprint(tiny_model(seed=1)), fingerprint(tiny_model(hidden_size=48))}
    assert len(prints) == 2


def test_another_storage_precision_leaves_it_as_it_was():
    assert fingerprint(tiny_model().to(torch.bfloat16)) == fingerprint(tiny_model())


PAIRS = list(itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_base_is_known_again_in_every_pair_of_types_and_another_one_is_not(one, other):
    found = base_fingerprint(tiny_model().to(one))
    assert found.same_base(base_fingerprint(tiny_model().to(other)))
    assert not found.same_base(base_fingerprint(tiny_model(seed=1).to(other)))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_signs_decide_only_between_the_two_half_types(one, other):
    model, scaled = tiny_model().to(one), tiny_model()
    with torch.no_grad():
        scaled.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    same = base_fingerprint(model).same_base(base_fingerprint(scaled.to(other)))
    assert same == ({one, other} == {torch.float16, torch.bfloat16})


def test_a_digest_alone_as_older_files_have_it_is_enough_where_it_was():
    old = replace(base_fingerprint(tiny_model()), as_float16=None, signs=None, dtype=None)
    assert old.same_base(base_fingerprint(tiny_model())) and old.same_base(base_fingerprint(tiny_model().bfloat16()))
    old_half = replace(base_fingerprint(tiny_model().half()), as_float16=None, signs=None, dtype=None)
    assert old_half.same_base(base_fingerprint(tiny_model()))


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("qwen3", "mixture_lora"), ("qwen3", "moe_expert_lora"), ("qwen3_moe", "native_moe_expert_lora")],
)
def test_the_backbone_inside_an_injected_model_has_the_fingerprint_of_the_bare_one(family, strategy):
    model = tiny_model(family)
    before = base_fingerprint(model)
    lmoe.inject(model, injection={"strategy": strategy})
    randomise(model)
    assert backbone_fingerprint(model) == before


def test_other_weights_and_other_shapes_change_it():
    prints = {fingerprint(tiny_model()), fingerprint(tiny_model(seed=1)), fingerprint(tiny_model(num_hidden_layers=3))}
    assert len(prints) == 3


def test_one_changed_layer_changes_it():
    model = tiny_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert fingerprint(model) != before
