"""A tiny injected model, away from its start, and its saved adapter."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

import lmoe
from lmoe.adapter.folder import save_adapter
from tests.tiny_models import randomise, tiny_model

INJECTION = {"lora_r": 2, "num_experts": 3}
BASE = {"name": "some/base", "revision": None, "precision": "float32"}


@pytest.fixture
def model() -> PreTrainedModel:
    """Injected, with random adapters and routers."""
    model = tiny_model()
    lmoe.inject(model, injection=INJECTION)
    randomise(model)
    return model


@pytest.fixture
def adapter(model: PreTrainedModel, tmp_path: Path) -> Path:
    """Its adapter folder."""
    return save_adapter(model, tmp_path / "adapter", BASE)
