"""Log-probabilities of answers that were computed before, found by the tokens of their row.

Shapes: M rows, each with one answer or two; a batch of B rows.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmoe.data.cache import load_tensors, save_tensors
from lmoe.data.encoded import EncodedRow, row_digest
from lmoe.files.writing_folder import writing_folder

FILE_VERSION = 2
"""In the name of a file: one of another version is not read."""


def answer_key(row: EncodedRow) -> int:
    """Number of 64 bits by which a row is found: of its tokens, of which of them are its answer, and of its domain, by
    which some routers go."""
    labels = row.is_label.numpy().astype(np.int32)
    return row_digest(np.concatenate([row.input_ids.numpy(), labels, np.array([row.domain], dtype=np.int32)]))


class KnownAnswers:
    """log p of the answers of M rows.

    Args:
        keys: (M,) int64, see `answer_key`, each once.
        log_probs: (M, 2) float32 of the chosen and of the rejected answer; of a single answer the first.
    """

    def __init__(self, keys: Tensor, log_probs: Tensor) -> None:
        order = keys.argsort()
        self.keys, self.log_probs = keys[order], log_probs[order]

    @classmethod
    def of(cls, found: Iterable[tuple[Tensor, Tensor]]) -> "KnownAnswers":
        """Keys (B,) and log-probabilities (B, 2) of many batches."""
        keys, log_probs = zip(*found, strict=True)
        return cls(torch.cat(keys).cpu(), torch.cat(log_probs).float().cpu())

    def __call__(self, keys: Tensor) -> Tensor:
        """(B, 2) of the rows of a batch, on the device of their keys, which need not wait; NaN for a row that is not
        known."""
        if self.keys.device != keys.device:
            self.keys, self.log_probs = self.keys.to(keys.device), self.log_probs.to(keys.device)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        known = (self.keys[place] == keys).unsqueeze(1)
        return torch.where(known, self.log_probs[place], torch.nan)

    def write(self, file: Path, key: str) -> None:
        """Store under a key, all or nothing.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        with writing_folder(file.parent) as folder:
            tensors = {"keys": self.keys.cpu(), "log_probs": self.log_probs.cpu()}
            save_tensors(tensors, {}, Path(folder) / file.name, file, key)

    @classmethod
    def read(cls, file: Path, key: str) -> "KnownAnswers | None":
        """What was stored under a key; None where there is nothing usable."""
        found = load_tensors(file, key, ("keys", "log_probs"))
        return None if found is None else cls(**found[0])
