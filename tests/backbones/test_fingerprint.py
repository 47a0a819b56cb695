"""The fingerprint follows the base's weights, and nothing else."""

import torch

import lmoe
from lmoe.backbones.fingerprint import fingerprint
from tests.tiny_models import randomise, tiny_model


def test_injection_and_training_of_adapters_leave_it_as_it_was():
    model = tiny_model()
    before = fingerprint(model)
    lmoe.inject(model, injection={"lora_B_std": 0.1})
    assert fingerprint(model) == before
    randomise(model)
    assert fingerprint(model) == before


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
