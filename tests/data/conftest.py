"""One small tokenizer for all data tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lmoe.pretrain.bpe import train_bpe

SENTENCES = (
    "The assistant answers the user in a few words.",
    "user and assistant and system are roles; a, b and c are letters.",
    "What is the capital of France? Paris is the capital of France.",
    "Two plus two is four, and three plus three is six.",
)


@pytest.fixture(scope="session")
def trained() -> PreTrainedTokenizerFast:
    """The tokenizer that `tokenizer` copies."""
    return train_bpe(SENTENCES * 4, 400, 512)


@pytest.fixture
def tokenizer(trained: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML and {% generation %}; the test's own copy, which it may change."""
    trained.save_pretrained(tmp_path / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write records as a JSONL file and return its path."""

    def write(*records: dict[str, Any], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(file)

    return write
