"""The fingerprint follows the base's weights, and nothing else."""

import torch

import lmoe
from lmoe.backbones.fingerprint import fingerprint
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


def test_other_weights_and_other_shapes_change_it():
    prints = {fingerprint(tiny_model()), fingerprint(tiny_model(seed=1)), fingerprint(tiny_model(num_hidden_layers=3))}
    assert len(prints) == 3


def test_one_changed_layer_changes_it():
    model = tiny_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert fingerprint(model) != before
