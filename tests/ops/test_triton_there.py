"""Triton is imported where it is asked for and there, and else said to be missing, in words."""

import json
import subprocess
import sys

import pytest
import torch

import lmoe
from lmoe.errors import InjectionError, RoutingError
from lmoe.ops import triton_there
from lmoe.ops.triton_there import INTERPRETED, triton_experts
from tests.layers.small_site import D, Site
from tests.tiny_models import tiny_model

STRATEGIES = {"mixture_lora": "llama", "moe_expert_lora": "llama", "native_moe_expert_lora": "qwen3_moe"}
MISSING = r"moe\.backend=triton needs the package triton, which is not installed: pip install 'lmoe\[triton\]'.*auto"


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(triton_there, "find_spec", lambda name: None)


@pytest.fixture
def installed(monkeypatch):
    """Triton, as far as anybody asks, without a card."""
    monkeypatch.setattr(triton_there, "find_spec", lambda name: object())
    monkeypatch.delenv(INTERPRETED, raising=False)


@pytest.mark.parametrize(("strategy", "family"), STRATEGIES.items())
def test_without_the_package_no_model_is_injected_and_the_message_says_what_to_install(no_triton, strategy, family):
    model = tiny_model(family)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(InjectionError, match=MISSING):
        lmoe.inject(model, {"strategy": strategy, "lora_r": 4}, {"backend": "triton"})
    assert [name for name, _ in model.named_parameters()] == before


def test_without_the_package_a_forward_says_so_too(no_triton):
    with pytest.raises(InjectionError, match=MISSING):
        Site(backend="triton").make()(torch.randn(2, D))


@pytest.mark.parametrize(("strategy", "family"), STRATEGIES.items())
def test_on_a_cpu_every_strategy_says_that_triton_needs_a_gpu(installed, strategy, family):
    model = tiny_model(family)
    lmoe.inject(model, {"strategy": strategy, "lora_r": 4}, {"backend": "triton"})
    with pytest.raises(RoutingError, match=r"moe\.backend=triton computes on a CUDA GPU.*are on cpu.*choose auto"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_an_adapter_that_triton_trained_is_written_with_auto_so_that_it_loads_anywhere(installed, tmp_path):
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 4}, {"backend": "triton"})
    lmoe.save(model, tmp_path / "adapter", base_model="somebody/base")
    assert json.loads((tmp_path / "adapter" / "lmoe_config.json").read_text())["moe"]["backend"] == "auto"


def test_on_a_gpu_the_kernels_are_what_is_imported(installed, monkeypatch):
    monkeypatch.setattr(triton_there.importlib, "import_module", lambda name: name)
    assert triton_experts(torch.device("cuda")) == "lmoe.ops.triton_experts"


@pytest.mark.parametrize("backend", ["auto", "stacked", "grouped"])
def test_no_other_backend_asks_for_triton(monkeypatch, backend):
    """Whatever auto chooses: many experts, of which grouped would be taken, and few."""

    def asked(device):
        raise AssertionError("asked for Triton")

    for room in ("lmoe.layers.mixture_lora_linear", "lmoe.ops.expert_rows"):
        monkeypatch.setattr(f"{room}.triton_experts", asked)
    for experts, rank in ((3, 4), (64, 16)):
        assert Site(backend=backend, experts=experts, rank=rank).make()(torch.randn(2, D)).shape[0] == 2


def test_importing_lmoe_and_a_step_import_no_kernels():
    code = (
        "import sys, torch, lmoe\n"
        "from tests.tiny_models import tiny_model\n"
        "model = tiny_model()\n"
        "lmoe.inject(model, {'strategy': 'moe_expert_lora'})\n"
        "model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()\n"
        "assert 'lmoe.ops.triton_there' in sys.modules and 'lmoe.ops.triton_experts' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
