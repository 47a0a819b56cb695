"""From rows to tokens with labels: each row is rendered once and tokenised once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.account import Account
from lmoe.data.chats.spans import Span
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encoded import EncodedRow, EncodedRows, row_digest
from lmoe.data.rows.row import Row
from lmoe.errors import DataError, LmoeError
from lmoe.files.wording import quoted

NO_ASSISTANT_TEXT = "no assistant text"
NO_TEXT = "no text"
NOTHING_TO_PREDICT = "no label token behind the first token"
CHUNK = 512
"""Rows rendered and tokenised at a time."""

Numbered = tuple[Row | LmoeError, int]
"""A row or why it is none, and its number in its file."""


def cut_reason(max_length: int) -> str:
    """Why a row is dropped whose labels all lie behind the cut."""
    return f"nothing left after truncation to {max_length} tokens"


@dataclass(slots=True, frozen=True)
class TokenisedRow:
    """What is made of one row of n tokens, before it is cut.

    Args:
        row: the row.
        input_ids: (n,) int32.
        is_label: (n,) bool.
        offsets: (start, end) characters in `text` of each token, empty for one that the tokenizer has added; None where
            the tokenizer does not tell.
        text: what was tokenised: a rendered conversation with its special tokens written out, or the plain text.
    """

    row: Row
    input_ids: np.ndarray
    is_label: np.ndarray
    offsets: Sequence[Span] | None
    text: str


@dataclass(slots=True, frozen=True, kw_only=True)
class Chunk:
    """Some rows of one file, tokenised: N rows that are kept, of M tokens.

    Args:
        place: index of the file in its source.
        input_ids: (M,) int32.
        is_label: (M,) bool.
        lengths, label_counts, digests, numbers: (N,) int64, as in EncodedRows.
        domains: of each kept row.
        account: of all rows.
    """

    place: int
    input_ids: np.ndarray
    is_label: np.ndarray
    lengths: np.ndarray
    label_counts: np.ndarray
    digests: np.ndarray
    numbers: np.ndarray
    domains: list[str]
    account: Account

    def rows(self) -> Iterator[tuple[Tensor, Tensor, str]]:
        """Yield tokens (n,) int32, labels (n,) bool and domain of each kept row."""
        ends = self.lengths.cumsum()
        for start, end, domain in zip(ends - self.lengths, ends, self.domains, strict=True):
            yield torch.from_numpy(self.input_ids[start:end]), torch.from_numpy(self.is_label[start:end]), domain


@dataclass(slots=True, frozen=True)
class EncodedSource:
    """What became of the rows of one source.

    Args:
        rows: the rows that can be learnt from, in the order of the source.
        domains: names, rows.domains points into it.
        account: of all that was read.
    """

    rows: EncodedRows
    domains: list[str]
    account: Account


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


def user_turn(row: Row) -> int | None:
    """Index of the user's first message in a row; None: it has none, or is plain text."""
    return next((index for index, turn in enumerate(row.messages or ()) if turn["role"] == "user"), None)


def not_for_sft(row: Row) -> str | None:
    """Why supervised fine-tuning cannot learn from a row, or None."""
    if row.chosen is not None:
        return (
            "chosen and rejected are two answers to compare, which task.name=sft does not do; "
            "data.columns={response: chosen} learns the chosen ones (of whole conversations {messages: chosen})"
        )
    if row.label is False:
        return "label is false, which marks a bad answer; task.name=sft would learn it"
    if row.answer is not None and row.format == "prompt":
        return "answer is what answers are checked against; data.columns={response: answer} learns it as the answer"
    return None


class Encoder:
    """Tokenise rows of chats and of plain text.

    Args:
        tokenizer: chats need one with character offsets ("fast").
        template: renders chats.
        max_length: longest row in tokens, at least 2.
        num_embeddings: of the backbone, which has no use for a row with a token beyond them; None: not known.
        prompt_prefix: put before the user's first message, as data.prompt_prefix says; None: nothing is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        max_length: int,
        num_embeddings: int | None = None,
        prompt_prefix: str | None = None,
    ) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.num_embeddings, self.prompt_prefix = num_embeddings, prompt_prefix

    def encode(self, rows: Sequence[Row]) -> EncodedSource:
        """Tokenise, cut and label rows that are at hand; count those that leave nothing to learn.

        Raises:
            DataError: rows that cannot be rendered or masked, with file and line.
        """
        chunks = list(self.chunks(((row, number) for number, row in enumerate(rows)), place=0))
        account = Account.sum(chunk.account for chunk in chunks)
        account.check()
        domains = sorted({row.domain for row in rows})
        kept = [
            EncodedRow(ids, labels, domains.index(domain)) for chunk in chunks for ids, labels, domain in chunk.rows()
        ]
        return EncodedSource(EncodedRows.of(kept), domains, account)

    def chunks(self, rows: Iterable[Numbered], place: int) -> Iterator[Chunk]:
        """Rows of one file as tokens, some at a time.

        Args:
            place: index of the file in its source.

        Raises:
            DataError: a tokenizer that cannot do it.
        """
        numbered = iter(rows)
        while some := list(islice(numbered, CHUNK)):
            yield self._chunk(some, place)

    def _chunk(self, rows: Sequence[Numbered], place: int) -> Chunk:
        account = Account(read=len(rows))
        kept: list[tuple[np.ndarray, np.ndarray, int, str]] = []
        tokenised = self.tokenise([row for row, _ in rows], account)
        for found, (_, number) in zip(tokenised, rows, strict=True):
            if isinstance(found, LmoeError):
                account.refuse(str(found))
                continue
            row = found.row
            if (beyond := self.beyond(found)) is not None:
                account.refuse(f"{row.where}: {beyond}")
                continue
            account.formats[row.format] += 1
            account.ignored.update(row.ignored)
            account.unprefixed += self.prompt_prefix is not None and user_turn(row) is None
            if row.answer is not None:
                account.ignored["answer"] += 1
            if (reason := self.nothing_to_learn(found)) is not None:
                account.dropped[reason] += 1
                continue
            labels = found.is_label[: self.max_length].copy()
            account.truncated += len(found.input_ids) > self.max_length
            kept.append((found.input_ids[: self.max_length], labels, number, row.domain))
            account.largest_token = max(account.largest_token, int(kept[-1][0].max()))
        ids = [part[0] for part in kept]
        return Chunk(
            place=place,
            input_ids=np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
            is_label=np.concatenate([np.zeros(0, dtype=bool), *(part[1] for part in kept)]),
            lengths=np.array([len(part) for part in ids], dtype=np.int64),
            label_counts=np.array([part[1][1:].sum() for part in kept], dtype=np.int64),
            digests=np.array([row_digest(part) for part in ids], dtype=np.int64),
            numbers=np.array([part[2] for part in kept], dtype=np.int64),
            domains=[part[3] for part in kept],
            account=account,
        )

    def beyond(self, found: TokenisedRow) -> str | None:
        """Why a row has a token that the backbone has no embedding for, or None."""
        ids = found.input_ids[: self.max_length]
        if self.num_embeddings is None or not len(ids) or (largest := int(ids.max())) < self.num_embeddings:
            return None
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return (
            f"it uses {quoted(token)} ({largest}); the tokenizer has {len(self.tokenizer)} tokens, the embedding of "
            f"the backbone {self.num_embeddings}: resize it, or use the tokenizer that it was trained with"
        )

    def nothing_to_learn(self, found: TokenisedRow) -> str | None:
        """Why nothing of a row can be learnt, so that it is dropped, or None."""
        row, labels = found.row, found.is_label
        if labels[1 : self.max_length].any():
            return None
        if row.text is not None and not row.text.strip():
            return NO_TEXT
        if row.text is None and not labels.any():
            return NO_ASSISTANT_TEXT
        return cut_reason(self.max_length) if labels[1:].any() else NOTHING_TO_PREDICT

    def tokenise(self, rows: Sequence[Row | LmoeError], account: Account) -> list[TokenisedRow | LmoeError]:
        """Rows as tokens, each in its place, or why it cannot be learnt from.

        Args:
            account: counts turns.

        Raises:
            DataError: a tokenizer that cannot do it.
        """
        found: list[TokenisedRow | LmoeError | None] = [row if isinstance(row, LmoeError) else None for row in rows]
        chats: list[tuple[int, Row]] = []
        texts: list[tuple[int, Row]] = []
        for index, row in enumerate(rows):
            if isinstance(row, LmoeError):
                continue
            if (reason := not_for_sft(row)) is not None:
                found[index] = DataError(f"{row.where}: {reason}")
            else:
                (chats if row.text is None else texts).append((index, row))
        for index, tokens in (*self._chats(chats, account), *self._texts(texts)):
            found[index] = tokens
        return [tokens for tokens in found if tokens is not None]

    def _chats(
        self, rows: Sequence[tuple[int, Row]], account: Account
    ) -> Iterator[tuple[int, TokenisedRow | LmoeError]]:
        if not rows:
            return
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                f"{rows[0][1].where}: {type(self.tokenizer).__name__} gives no character offsets, so the assistant's "
                "tokens cannot be found. Use a tokenizer with a tokenizer.json (a fast one), or plain text rows"
            )
        rendered = []
        for index, row in rows:
            try:
                rendered.append((index, row, self.template.render(self._prefixed(row))))
            except DataError as error:
                if self.template.source is None:
                    raise
                yield index, error
        if not rendered:
            return
        tokens = self.tokenizer(
            [r.text for _, _, r in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for (index, row, r), ids, offsets in zip(rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            labels = token_labels(offsets, r.spans).numpy()
            account.turns += r.turns
            account.endless += r.endless
            account.shortened += r.shortened
            yield index, TokenisedRow(row, np.asarray(ids, dtype=np.int32), labels, offsets, r.text)

    def _prefixed(self, row: Row) -> Row:
        """The row with the prefix before the user's first message."""
        if self.prompt_prefix is None or (first := user_turn(row)) is None:
            return row
        prefix, turns = self.prompt_prefix.replace("{domain}", row.domain), list(row.messages or ())
        turns[first] = turns[first] | {"content": prefix + turns[first]["content"]}
        return replace(row, messages=tuple(turns))

    def _texts(self, rows: Sequence[tuple[int, Row]]) -> Iterator[tuple[int, TokenisedRow]]:
        if not rows:
            return
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        texts = [row.text or "" for _, row in rows]
        fast = isinstance(self.tokenizer, PreTrainedTokenizerFast)
        tokens = self.tokenizer(texts, return_offsets_mapping=fast, verbose=False)
        for number, ((index, row), text, ids) in enumerate(zip(rows, texts, tokens["input_ids"], strict=True)):
            offsets = tokens["offset_mapping"][number] if fast else None
            if eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
                offsets = None if offsets is None else [*offsets, (len(text), len(text))]
            labels = np.full(len(ids), bool(text.strip()))
            if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(self.tokenizer.bos_token)):
                # The text brings the token that the tokenizer adds.
                ids, labels, offsets = ids[1:], labels[1:], None if offsets is None else offsets[1:]
                labels[0] = False
            yield index, TokenisedRow(row, np.asarray(ids, dtype=np.int32), labels, offsets, text)
