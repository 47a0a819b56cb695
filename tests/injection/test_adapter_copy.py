"""A model computes with its adapters as they were, and has its own back."""

import pytest
import torch
from torch import nn

import lmoe
from lmoe.injection import adapter_copy
from lmoe.injection.adapter_copy import AdapterCopy
from tests.tiny_models import randomise, tiny_model

IDS = torch.arange(3, 11)[None]


@pytest.fixture
def model():
    found = tiny_model()
    lmoe.inject(found, {"lora_r": 2, "num_experts": 2})
    randomise(found)
    return found.eval()


def test_parameters_that_others_were_put_in_place_of_change_places_too(model):
    """As sharding does, between one forward with the copy and the next."""
    copy, start = AdapterCopy.of(model), model(input_ids=IDS).logits
    randomise(model, seed=2)
    for replaced in (False, True):
        if replaced:
            name = next(name for name in copy.tensors if name.endswith("lora_B"))
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, nn.Parameter(torch.ones_like(model.get_parameter(name))))
        now = model(input_ids=IDS).logits
        with copy.in_place(model):
            assert torch.equal(model(input_ids=IDS).logits, start)
        assert torch.equal(model(input_ids=IDS).logits, now) and not torch.equal(now, start)


def test_the_adapters_of_a_model_are_looked_for_once(model, monkeypatch):
    copy, looked = AdapterCopy.of(model), []
    original = adapter_copy.adapter_parameters
    monkeypatch.setattr(adapter_copy, "adapter_parameters", lambda model: looked.append(model) or original(model))
    for _ in range(3):
        with copy.in_place(model):
            pass
    assert looked == [model]
