"""A base to blend over, and three experts of it."""

import copy
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.peft_experts import three
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    """A base to blend over; not to be changed."""
    return tiny_model()


@pytest.fixture(scope="module")
def places(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three PEFT experts of it."""
    return three(base, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def model(base: PreTrainedModel) -> PreTrainedModel:
    """The base in a copy that a test may blend into."""
    return copy.deepcopy(base)
