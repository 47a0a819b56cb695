"""Put several rows into one sequence, attention kept apart by position ids that restart at each row.

Transformers makes the block mask out of position_ids alone (masking_utils.find_packed_sequence_indices), for any batch
size, if there is no attention mask and no KV cache. Where a model has another way to carry information along a sequence
(a convolution, a recurrent state, absolute positions of its own making), rows leak into one another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lmoe.data.encoded import EncodedRow, EncodedRows

PACKS_EXACTLY = frozenset(
    {
        *("apertus", "arcee", "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text"),
        *("glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoeshared"),
        *("helium", "hunyuan_v1_dense", "llama", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral"),
        *("nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2"),
        *("qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
    }
)
"""Model types whose packed logits equal those of the rows alone (run with tiny random models, transformers 5.23)."""
KEEPS_BOUNDS_FROM_FLASH = frozenset({"nemotron", "stablelm"})
"""Those among them whose code does not hand the bounds of rows on to flash attention."""
RECURRENT = (
    *("qwen3_5", "qwen3_next", "mamba", "jamba", "bamba", "zamba", "falcon_h1", "granitemoehybrid", "lfm2", "rwkv"),
    *("recurrent_gemma", "nemotron_h", "olmo_hybrid", "kimi_linear", "xlstm"),
)
"""Parts of the names of model types that carry a state along the sequence."""


def packing_supported(model_type: str) -> str | None:
    """None if the model keeps packed rows apart, or the reason why packing is refused.

    Args:
        model_type: the backbone's config.model_type.
    """
    if model_type in PACKS_EXACTLY:
        return None
    if any(name in model_type for name in RECURRENT):
        return f"model type {model_type} has recurrent or convolutional layers, through which packed rows leak"
    return f"model type {model_type} was never shown to keep packed rows apart"


def packing_supported_by_attention(attn_implementation: str | None, model_type: str, batch_size: int) -> str | None:
    """None if the attention keeps packed rows apart, or the reason why packing is refused.

    Flash attention is told where rows begin (`row_bounds`), by way of the model's code. Where that does not hand it on,
    position_ids say it in batches of one sequence, and in larger ones the rows leak silently.

    Args:
        attn_implementation: the backbone's, e.g. sdpa.
        model_type: the backbone's config.model_type.
        batch_size: sequences in a micro-batch.
    """
    flash = attn_implementation is not None and "flash" in attn_implementation
    if flash and model_type in KEEPS_BOUNDS_FROM_FLASH and batch_size > 1:
        return (
            f"{attn_implementation} of model type {model_type} keeps packed rows apart only with data.batch_size=1, "
            f"got {batch_size}"
        )
    return None


def best_fit(lengths: list[int], max_length: int, seed: int) -> list[list[int]]:
    """Sequences as lists of row indices: longest rows first, each into the fullest sequence that has room for it.

    Rows of one length are taken in a seeded order, so that the domains of a source that lists them one by one mix.

    Args:
        lengths: tokens of each row, 1 to max_length.
        max_length: room of a sequence in tokens.
    """
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    sequences: list[list[int]] = []
    open_rooms = Rooms()
    for row in sorted(shuffled, key=lambda index: -lengths[index]):
        found = open_rooms.take(lengths[row])
        if found is None:
            found = max_length, len(sequences)
            sequences.append([])
        room, sequence = found
        sequences[sequence].append(row)
        if room > lengths[row]:
            open_rooms.add(room - lengths[row], sequence)
    return sequences


class Rooms:
    """Sequences with room left, by their room: what is searched is as long as there are different rooms, at most the
    length of a sequence, however many sequences are open.

    Attributes:
        sizes: the rooms that there are, ascending.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._sequences: dict[int, list[int]] = {}

    def add(self, room: int, sequence: int) -> None:
        """Open a sequence with so much room."""
        if room not in self._sequences:
            insort(self.sizes, room)
            self._sequences[room] = []
        heappush(self._sequences[room], sequence)

    def take(self, length: int) -> tuple[int, int] | None:
        """Close the first of the fullest sequences that have room for a length, and return its room and number."""
        place = bisect_left(self.sizes, length)
        if place == len(self.sizes):
            return None
        room = self.sizes[place]
        sequence = heappop(self._sequences[room])
        if not self._sequences[room]:
            del self._sequences[room], self.sizes[place]
        return room, sequence


def packing_line(rows: EncodedRows, max_length: int, seed: int, model_type: str | None) -> str:
    """What data.packing=true would make of training rows that are not packed.

    Args:
        model_type: the backbone's config.model_type; None: not known.
    """
    if model_type is not None and (reason := packing_supported(model_type)):
        return f"packing: off; data.packing=true would be refused: {reason}"
    sequences = len(best_fit(rows.lengths.tolist(), max_length, seed))
    fill = int(rows.lengths.sum()) / (sequences * max_length)
    unsure = "" if model_type else " (whether the backbone keeps rows apart is not known)"
    return (
        f"packing: off; data.packing=true would make {sequences:,} sequences of {max_length:,} tokens of "
        f"{len(rows):,} training rows, {fill:.1%} full{unsure}"
    )


@dataclass(slots=True, frozen=True)
class PackedRows(Dataset[tuple[EncodedRow, ...]]):
    """Packed sequences of rows.

    Args:
        rows: all rows.
        sequences: indices of the rows of each sequence.
    """

    rows: EncodedRows
    sequences: list[list[int]]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[EncodedRow, ...]:
        return tuple(self.rows[row] for row in self.sequences[index])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (S,) int64."""
        return self._sums(self.rows.lengths)

    @property
    def label_counts(self) -> Tensor:
        """Tokens of each sequence that carry a label, (S,) int64."""
        return self._sums(self.rows.label_counts)

    def _sums(self, of_rows: Tensor) -> Tensor:
        counts = torch.tensor([len(rows) for rows in self.sequences])
        rows = torch.tensor([row for rows in self.sequences for row in rows])
        place = torch.arange(len(self.sequences)).repeat_interleave(counts)
        return torch.zeros(len(self.sequences), dtype=torch.long).index_add(0, place, of_rows[rows])

    @staticmethod
    def of(rows: EncodedRows, max_length: int, seed: int) -> PackedRows:
        """Pack all rows."""
        return PackedRows(rows, best_fit(rows.lengths.tolist(), max_length, seed))
