"""From rows to tokens with labels: each row is rendered once and tokenised once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.data.row import Row
from lmoe.data.spans import Span
from lmoe.data.template import ChatTemplate
from lmoe.errors import DataError

NO_ASSISTANT_TEXT = "no assistant text"
NO_TEXT = "no text"
NOTHING_TO_PREDICT = "no label token behind the first token"
CHUNK = 512
"""Rows rendered and tokenised at a time."""


def cut_reason(max_length: int) -> str:
    """Why a row is dropped whose labels all lie behind the cut."""
    return f"nothing left after truncation to {max_length} tokens"


@dataclass(slots=True, frozen=True)
class EncodedSource:
    """What became of the rows of one source.

    Args:
        rows: the rows that can be learnt from, in the order of the source.
        domains: names, rows.domains points into it.
        read: rows read.
        dropped: rows left out, by reason.
        truncated: rows among `rows` that were cut at the end.
    """

    rows: EncodedRows
    domains: list[str]
    read: int
    dropped: dict[str, int]
    truncated: int


def token_labels(offsets: Sequence[Span], spans: Sequence[Span]) -> Tensor:
    """Whether each token shares at least one character with a span, (n,) bool.

    So a token across the start of a span (such as Llama 2's " Hello", whose space belongs to the template) is a label
    token, as in transformers' own assistant mask: nothing else could start the turn.

    Args:
        offsets: (start, end) characters of each of n tokens.
        spans: the characters to be learnt.
    """
    starts, ends = token_places(offsets)
    labels = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        labels |= (starts < end) & (ends > start) & (starts < ends)
    return torch.from_numpy(labels)


def token_places(offsets: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """First character of each of n tokens, and the one behind its last, each (n,) int64.

    Tokenizers that trim white space from offsets would lose such a character, so a token starts where the one before it
    ended. The bytes of one character are several tokens with the same offsets.
    """
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], places[:, 1]
    return np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])[: len(starts)]), ends


class Encoder:
    """Tokenise rows of chats and of plain text.

    Args:
        tokenizer: chats need one with character offsets ("fast").
        template: renders chats.
        max_length: longest row in tokens, at least 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length

    def encode(self, rows: Sequence[Row]) -> EncodedSource:
        """Tokenise, cut and label all rows; count those that leave nothing to learn.

        Raises:
            DataError: a conversation that cannot be rendered or masked, with file and line.
        """
        domains = sorted({row.domain for row in rows})
        index = {name: i for i, name in enumerate(domains)}
        dropped: Counter[str] = Counter()
        kept: list[EncodedRow] = []
        truncated = 0
        for row, (ids, labels) in zip(rows, self._tokenised(rows), strict=True):
            cut = labels[: self.max_length].clone()
            if not bool(cut[1:].any()):
                dropped[self._reason(row, labels)] += 1
                continue
            truncated += len(ids) > self.max_length
            kept.append(EncodedRow(torch.tensor(ids[: self.max_length], dtype=torch.int32), cut, index[row.domain]))
        return EncodedSource(EncodedRows.of(kept), domains, len(rows), dict(sorted(dropped.items())), truncated)

    def _reason(self, row: Row, labels: Tensor) -> str:
        if row.text is not None and not row.text.strip():
            return NO_TEXT
        if row.text is None and not bool(labels.any()):
            return NO_ASSISTANT_TEXT
        return cut_reason(self.max_length) if bool(labels[1:].any()) else NOTHING_TO_PREDICT

    def _tokenised(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            chats = iter(self._chats([row for row in chunk if row.text is None]))
            texts = iter(self._texts([row.text for row in chunk if row.text is not None]))
            for row in chunk:
                yield next(chats if row.text is None else texts)

    def _chats(self, rows: Sequence[Row]) -> list[tuple[list[int], Tensor]]:
        if not rows:
            return []
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                f"{rows[0].where}: {type(self.tokenizer).__name__} gives no character offsets, so the assistant's "
                "tokens cannot be found. Use a tokenizer with a tokenizer.json (a fast one), or plain text rows"
            )
        rendered = [self.template.render(row) for row in rows]
        tokens = self.tokenizer(
            [r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = tokens["offset_mapping"]
        return [
            (ids, token_labels(o, r.spans)) for ids, o, r in zip(tokens["input_ids"], offsets, rendered, strict=True)
        ]

    def _texts(self, texts: Sequence[str]) -> list[tuple[list[int], Tensor]]:
        if not texts:
            return []
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        encoded = []
        for text, ids in zip(texts, self.tokenizer(list(texts), verbose=False)["input_ids"], strict=True):
            if eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
            labels = torch.full((len(ids),), bool(text.strip()))
            if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(self.tokenizer.bos_token)):
                ids, labels = ids[1:], labels[1:]  # the text brings the one that the tokenizer adds
                labels[0] = False
            encoded.append((ids, labels))
        return encoded
