"""Losses of rows that lie with a run, so that the same rows are not measured again under the same adapter."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lmoe.adapter.folder import WEIGHTS_FILE
from lmoe.adapter.place import adapter_folder
from lmoe.errors import CheckpointError
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.row_losses import RowLoss, label_digest, read_row_losses

FOLDER = "evaluation"
"""Of a run."""


def adapter_hash(run: Path) -> str:
    """SHA-256 of the adapter of a run."""
    return hashlib.sha256((adapter_folder(run) / WEIGHTS_FILE).read_bytes()).hexdigest()


def losses_file(run: Path, adapter: str, rows: EvaluationRows, max_length: int) -> Path:
    """Where losses lie.

    Args:
        run: its run directory.
        adapter: its hash.
        rows: that are measured.
        max_length: to which they were cut.
    """
    key = hashlib.sha256(" ".join([*rows.row_ids(), adapter, str(max_length)]).encode()).hexdigest()[:16]
    return run / FOLDER / f"rows_{key}.csv"


def kept_losses(file: Path, asked: Sequence[tuple[str, str, str]]) -> list[RowLoss] | None:
    """The losses of a file that holds those of these rows; None: they are to be measured.

    Args:
        asked: name, domain and digest of the labels of each row (`asked_of`).
    """
    if not file.exists():
        return None
    try:
        losses = read_row_losses(file)
    except CheckpointError:
        return None
    return losses if [(loss.row, loss.domain, loss.labels) for loss in losses] == list(asked) else None


def asked_of(rows: EvaluationRows) -> list[tuple[str, str, str]]:
    """Name, domain and digest of the labels of each row."""
    named = zip(rows.row_ids(), rows.rows, strict=True)
    return [(name, rows.domains[row.domain], label_digest(row)) for name, row in named]
