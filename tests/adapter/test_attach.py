"""Attaching an adapter to a model in memory: what load gives, trainable; what does not fit changes nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors
from lmoe.errors import CheckpointError, InjectionError, LmoeError
from lmoe.injection.record import injected
from tests.tiny_models import randomise, tiny_model, tokens

SETTINGS = [
    ("qwen3", {"strategy": "mixture_lora"}, {"router": "top_k"}),
    ("qwen3", {"strategy": "mixture_lora"}, {"router": "sequence"}),
    ("qwen3", {"strategy": "mixture_lora"}, {"router_scope": "block"}),
    ("qwen3", {"strategy": "mixture_lora"}, {"router": "sequence", "router_scope": "model", "prompt_experts": True}),
    ("qwen3", {"strategy": "moe_expert_lora"}, {"router": "sequence", "router_scope": "model", "prompt_experts": True}),
    ("qwen3", {"strategy": "mixture_lora", "init_lora": "svd", "num_experts": 2, "lora_r": 4}, {}),
    ("qwen3", {"strategy": "dense_lora", "attn_lora": {"use_dora": True}}, {}),
    ("qwen3", {"strategy": "moe_expert_lora"}, {}),
    ("qwen3_moe", {"strategy": "native_moe_expert_lora"}, {}),
]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.fixture
def adapter(tmp_path):
    model = tiny_model()
    lmoe.inject(model)
    randomise(model)
    return lmoe.save(model, tmp_path / "adapter")


@pytest.mark.parametrize(("family", "injection", "moe"), SETTINGS)
def test_a_base_in_memory_becomes_the_saved_model_and_trains_on(family, injection, moe, tmp_path):
    saved, model = tiny_model(family), tiny_model(family)
    lmoe.inject(saved, injection, moe)
    randomise(saved)
    plan = lmoe.attach(model, lmoe.save(saved, tmp_path / "adapter"))
    assert torch.equal(logits(model), logits(saved)) and str(plan) == str(injected(saved).plan)
    assert not model.training
    trainable = {name for name, p in saved.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_run_and_its_adapter_folder_attach_alike(trained):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.attach(model, trained.run)
    assert torch.equal(logits(model), logits(trained.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_may_be_in_another_type(adapter, dtype):
    model = tiny_model().to(dtype)
    lmoe.attach(model, adapter)
    stored = load_file(adapter / WEIGHTS_FILE)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter_tensors(model).items())


def _lose_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["more.lora_A"] = tensors.pop(next(key for key in tensors if key.endswith("router.weight")))
    save_file(tensors, folder / WEIGHTS_FILE)


def _other_shape(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    key = next(key for key in tensors if key.endswith("experts.0.lora_A"))
    tensors[key] = torch.zeros(len(tensors[key]) + 1, tensors[key].shape[1])
    save_file(tensors, folder / WEIGHTS_FILE)


def _other_targets(folder):
    raw = json.loads((folder / CONFIG_FILE).read_text())
    raw["injection"]["target_keywords"] = ["nothing"]
    (folder / CONFIG_FILE).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("spoil", "seed", "words"),
    [
        (_lose_a_tensor, 0, "keys missing"),
        (_other_shape, 0, "expected"),
        (_other_targets, 0, "does not fit this model"),
        (lambda folder: None, 1, "trained on another base"),
        (lambda folder: (folder / CONFIG_FILE).unlink(), 0, "lmoe_config.json is not"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(adapter, spoil, seed, words):
    spoil(adapter)
    model = tiny_model(seed=seed)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.embed_tokens.weight.requires_grad_(False)
    trainable = [p.requires_grad for p in model.parameters()]
    names, attributes = list(model.state_dict()), sorted(vars(model))
    with pytest.raises(CheckpointError, match=words):
        lmoe.attach(model, adapter)
    assert list(model.state_dict()) == names and sorted(vars(model)) == attributes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(logits(model), logits(tiny_model(seed=seed))) and calls == [1]
    handle.remove()
    logits(model)
    assert calls == [1]
    lmoe.inject(model)


def test_a_model_that_carries_something_is_refused(adapter):
    model = tiny_model()
    lmoe.attach(model, adapter)
    with pytest.raises(InjectionError, match="already carries experts"):
        lmoe.attach(model, adapter)
    assert issubclass(InjectionError, LmoeError)
