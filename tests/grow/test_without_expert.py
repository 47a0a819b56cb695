"""An adapter of which an expert was taken out loads, also where one is left, and computes what its mask computes."""

import json

import pytest
import torch

import lmoe
from lmoe.errors import CheckpointError
from lmoe.grow.without_expert import write_without_expert
from tests.tiny_models import randomise, tiny_model, tokens

OF_MODEL = {"router": "sequence", "router_scope": "model", "prompt_experts": True}
FREE = {"load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.001}}
DOMAIN, CLUSTER = {"router_target": "domain", "domains": ["a", "b"]}, {"router_target": "cluster"}
ADAPTERS = {
    "diversity": {"diversity_coef": 0.1},
    "a bias": FREE,
    "sigmoid": {"router": "sigmoid"},
    "taught domains": OF_MODEL | DOMAIN | {"scale": "sum_to_one", "router_fit_prompts": 64},
    "taught clusters": OF_MODEL | CLUSTER | {"scale": "sum_to_one"},
    "raw weights": CLUSTER | {"norm_topk_prob": False},
    "all at once": CLUSTER | FREE | {"diversity_coef": 0.1, "router_target_coef": 0.5},
}


def adapter(folder, moe: dict):
    """A model with two experts, and its files."""
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 2, "num_experts": 2, "top_k": 1}, moe)
    randomise(model)
    return model.eval(), lmoe.save(model, folder)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_last_expert_computes_what_the_mask_does_without_settings_that_mean_nothing_to_it(name, tmp_path):
    model, folder = adapter(tmp_path / "two", ADAPTERS[name])
    one = tiny_model()
    lmoe.attach(one, write_without_expert(folder, tmp_path / "one", "0"))
    with torch.no_grad(), lmoe.masked_experts(model, [0]):
        assert torch.equal(one.eval()(tokens()).logits, model(tokens()).logits)


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    """A setting of a later lmoe, or one that no export has thought of."""
    _, folder = adapter(tmp_path / "two", {})
    config = json.loads((folder / "lmoe_config.json").read_text())
    config["moe"]["temperature"] = 0.0
    (folder / "lmoe_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="without this expert it could not be loaded: moe.temperature is 0"):
        write_without_expert(folder, tmp_path / "one", "0")
    assert not (tmp_path / "one").exists()
