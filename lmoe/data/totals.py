"""Tokens of whole optimizer steps, known before the step: the order of the samples is a pure function."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe.data.encoded import EncodedRows
from lmoe.data.order import SeededBatches
from lmoe.data.pack import PackedRows


@dataclass(slots=True, frozen=True)
class SampleTokens:
    """Tokens of each sample (row, or packed sequence).

    Args:
        lengths: (N,) int64 tokens.
        labels: (N,) int64 tokens that carry a label.
    """

    lengths: Tensor
    labels: Tensor

    @classmethod
    def of(cls, samples: EncodedRows | PackedRows) -> "SampleTokens":
        """Count them."""
        if isinstance(samples, EncodedRows):
            return cls(samples.lengths, samples.label_counts)
        lengths, labels = samples.rows.lengths, samples.rows.label_counts
        return cls(
            torch.stack([lengths[list(rows)].sum() for rows in samples.sequences]),
            torch.stack([labels[list(rows)].sum() for rows in samples.sequences]),
        )

    def window(self, batches: SeededBatches, step: int, micro_batches: int) -> tuple[int, int]:
        """(label tokens, tokens) of an optimizer step over all its micro-batches and ranks.

        Args:
            batches: the training order.
            step: optimizer steps done before.
            micro_batches: of one optimizer step on one rank.
        """
        samples = micro_batches * batches.world_size * batches.batch_size
        indices = [batches.index(position) for position in range(step * samples, (step + 1) * samples)]
        return int(self.labels[indices].sum()), int(self.lengths[indices].sum())

    def largest(self, batches: SeededBatches) -> list[int]:
        """Indices of the micro-batch of this rank that holds the longest sample: it takes the most memory."""
        return max(iter(batches), key=lambda indices: int(self.lengths[indices].max()))
