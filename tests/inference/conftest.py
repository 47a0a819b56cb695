"""A base on disk with its tokenizer, an adapter for it that is away from its start, and both in one run directory."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

import lmoe
from lmoe.data.bpe import train_bpe
from tests.inference.peft_experts import three
from tests.tiny_models import randomise, tiny_model

TEXTS = ("it's a, b = {c}! Answer the question.", "user and assistant say hello to the user and the assistant.")
VOCAB, CONTEXT = 300, 96


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """base: model directory; run: run directory; adapter: its adapter; model: in memory, as it was saved."""
    folder = tmp_path_factory.mktemp("inference")
    base, run = folder / "base", folder / "run"
    tokenizer = train_bpe(TEXTS, VOCAB, CONTEXT)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    tiny_model(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **ids).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    lmoe.inject(model, injection={"lora_r": 4, "num_experts": 3})
    randomise(model, std=0.2)
    lmoe.save(model, run / "adapter", tokenizer=tokenizer)
    (run / "config.yaml").write_text("seed: 0\n")
    return SimpleNamespace(base=base, run=run, adapter=run / "adapter", model=model, tokenizer=tokenizer)


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
