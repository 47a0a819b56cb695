"""Rows, and how they become batches."""

from dataclasses import dataclass, field
from typing import Any

from lmoe.vocabulary import TrainOn


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Training and validation rows."""

    path: str = "bundled"
    """JSONL file, folder of them, hub data set, or bundled (the eight domains that ship with lmoe)."""
    val_path: str | None = None
    """Validation rows, likewise; null: a seeded share of data.path (bundled: its own validation rows)."""
    val_fraction: float = 0.05
    """Share of the rows kept for validation where there is no val_path, above 0 and below 1."""
    val_rows_per_domain: int = 0
    """Validation rows used of each domain, the first ones; 0: all."""
    max_length: int = 512
    """Longest row in tokens; what is longer is cut at the end."""
    batch_size: int = 16
    """Rows (with packing: packed sequences of max_length tokens) in one micro-batch."""
    packing: bool | None = False
    """Put several training rows into one sequence of max_length tokens, attention kept apart by position ids; null:
    where the backbone is known to keep them apart."""
    num_workers: int = 0
    """Processes that load batches; 0: the main process."""
    chat_template: str | None = None
    """File with a Jinja chat template, which is saved with the adapter; null: the tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}; they are saved with the adapter's template."""
    template_date: str | None = None
    """Day (YYYY-MM-DD) that a chat template reads which asks for the date; null: the day the run begins."""
    train_on: TrainOn = TrainOn.assistant
    """Turns that are learnt: all of the assistant's, its last one, or all text; turns with weight 0 never are."""
    cache_dir: str | None = None
    """Folder of tokenised rows; null: $XDG_CACHE_HOME/lmoe or ~/.cache/lmoe."""
