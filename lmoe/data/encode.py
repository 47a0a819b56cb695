"""From rows to tokens with labels: each row is rendered once and tokenised once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lmoe.data.rows.contract import PROMPT_APART
from lmoe.data.rows.row import Message, Row
from lmoe.errors import DataError, LmoeError
from lmoe.files.wording import quoted
from lmoe.rules.objectives import tasks_of
from lmoe.vocabulary import RowKind

NO_ASSISTANT_TEXT = "no assistant text"
NO_TEXT = "no text"
NOTHING_TO_PREDICT = "no label token behind the first token"
ALIKE = "both answers are the same tokens"
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
        rejected: of a pair the prompt with the rejected answer; the rest is the prompt with the chosen one.
    """

    row: Row
    input_ids: np.ndarray
    is_label: np.ndarray
    offsets: Sequence[Span] | None
    text: str
    rejected: TokenisedRow | None = None

    @property
    def sequences(self) -> tuple[TokenisedRow, ...]:
        """The sequences that the row is: one, or of a pair two."""
        return (self,) if self.rejected is None else (self, self.rejected)


@dataclass(slots=True, frozen=True, kw_only=True)
class Chunk:
    """Some rows of one file, tokenised: N rows that are kept, of M tokens.

    Args:
        place: index of the file in its source.
        input_ids: (M,) int32.
        is_label: (M,) bool.
        lengths, label_counts, digests, numbers, seconds, good: (N,) int64, as in EncodedRows.
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
    seconds: np.ndarray
    good: np.ndarray
    domains: list[str]
    account: Account

    def rows(self, index_of: Callable[[str], int]) -> Iterator[EncodedRow]:
        """Yield each kept row; `index_of` gives the index of a domain."""
        ends = self.lengths.cumsum()
        for i, (start, end) in enumerate(zip(ends - self.lengths, ends, strict=True)):
            ids, labels = torch.from_numpy(self.input_ids[start:end]), torch.from_numpy(self.is_label[start:end])
            domain = index_of(self.domains[i])
            yield EncodedRow(ids, labels, domain, second=int(self.seconds[i]), good=bool(self.good[i]))


@dataclass(slots=True, frozen=True, kw_only=True)
class _Kept:
    """What is kept of one row; see `EncodedRow`."""

    ids: np.ndarray
    labels: np.ndarray
    number: int
    domain: str
    second: int
    good: bool


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


def prefixed(row: Row, prefix: str | None) -> Row:
    """A row with a text before the user's first message.

    Args:
        prefix: as data.prompt_prefix says; None: nothing.
    """
    if prefix is None or (first := user_turn(row)) is None:
        return row
    turns = list(row.messages or ())
    turns[first] = turns[first] | {"content": prefix.replace("{domain}", row.domain) + turns[first]["content"]}
    return replace(row, messages=tuple(turns))


def refused_by(kind: RowKind, row: Row) -> str | None:
    """Why nothing of a kind can be learnt from a row, or None."""
    if kind is not RowKind.answers and row.text is not None:
        return f"plain text has no answers to prefer, and task.name={tasks_of(kind)} learns from such"
    match kind:
        case RowKind.pairs if row.chosen is None:
            return (
                f'it is no pair of answers, and task.name={tasks_of(kind)} learns from pairs: {{"prompt": …, "chosen": '
                '…, "rejected": …}'
            )
        case RowKind.labelled if row.chosen is None and row.label is None:
            why = "nothing says whether its answer is a good one"
            if "label" in row.ignored:
                why = "label is neither true nor false (0 and 1 may number classes)"
            return (
                f"{why}, and task.name={tasks_of(kind)} learns from that: "
                '{"prompt": …, "completion": …, "label": true or false}, or pairs of answers'
            )
        case RowKind.answers:
            return _not_for_sft(row)
    return None


def _not_for_sft(row: Row) -> str | None:
    if row.chosen is not None:
        return (
            "chosen and rejected are two answers to compare, which task.name=sft does not do "
            f"({tasks_of(RowKind.pairs)} do); "
            "data.columns={response: chosen} learns the chosen ones (of whole conversations {messages: chosen})"
        )
    if row.label is False:
        return "label is false, which marks a bad answer; task.name=sft would learn it"
    if row.answer is not None and row.format == "prompt":
        return "answer is what answers are checked against; data.columns={response: answer} learns it as the answer"
    return None


def _answered(row: Row, answer: Sequence[Message], label: bool | None = None) -> Row:
    """The conversation of a pair with one of its answers, which alone is learnt."""
    prompt = tuple(row.messages or ())
    muted = _assistant_turns(prompt)
    return replace(row, messages=(*prompt, *answer), muted=muted, chosen=None, rejected=None, label=label)


def _assistant_turns(turns: Sequence[Message]) -> frozenset[int]:
    return frozenset(index for index, turn in enumerate(turns) if turn["role"] == "assistant")


class Encoder:
    """Tokenise rows of chats and of plain text.

    Args:
        tokenizer: chats need one with character offsets ("fast").
        template: renders chats.
        max_length: longest row in tokens, at least 2.
        num_embeddings: of the backbone, which has no use for a row with a token beyond them; None: not known.
        prompt_prefix: put before the user's first message, as data.prompt_prefix says; None: nothing is.
        kind: of what is learnt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        max_length: int,
        num_embeddings: int | None = None,
        prompt_prefix: str | None = None,
        kind: RowKind = RowKind.answers,
    ) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.num_embeddings, self.prompt_prefix, self.kind = num_embeddings, prompt_prefix, kind

    def encode(self, rows: Sequence[Row]) -> EncodedSource:
        """Tokenise, cut and label rows that are at hand; count those that leave nothing to learn.

        Raises:
            DataError: rows that cannot be rendered or masked, with file and line.
        """
        chunks = list(self.chunks(((row, number) for number, row in enumerate(rows)), place=0))
        account = Account.sum(chunk.account for chunk in chunks)
        account.check()
        domains = sorted({row.domain for row in rows})
        kept = [row for chunk in chunks for row in chunk.rows(domains.index)]
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
        rows = list(self.answers_apart(rows))
        account = Account(read=len(rows))
        kept: list[_Kept] = []
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
            account.truncated += any(len(part.input_ids) > self.max_length for part in found.sequences)
            kept.append(self._kept(found, number))
            account.largest_token = max(account.largest_token, int(kept[-1].ids.max()))
        ids = [row.ids for row in kept]
        return Chunk(
            place=place,
            input_ids=np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
            is_label=np.concatenate([np.zeros(0, dtype=bool), *(row.labels for row in kept)]),
            lengths=np.array([len(part) for part in ids], dtype=np.int64),
            label_counts=np.array([row.labels[1:].sum() for row in kept], dtype=np.int64),
            digests=np.array([row_digest(part) for part in ids], dtype=np.int64),
            numbers=np.array([row.number for row in kept], dtype=np.int64),
            seconds=np.array([row.second for row in kept], dtype=np.int64),
            good=np.array([row.good for row in kept], dtype=np.int64),
            domains=[row.domain for row in kept],
            account=account,
        )

    def answers_apart(self, rows: Iterable[Numbered]) -> Iterator[Numbered]:
        """The rows; where single answers are learnt, a pair is its good answer and its bad one."""
        for row, number in rows:
            if self.kind is RowKind.labelled and isinstance(row, Row) and row.chosen is not None:
                for answer, good in ((row.chosen, True), (row.rejected, False)):
                    yield _answered(row, answer or (), label=good), number
            else:
                yield row, number

    def _kept(self, found: TokenisedRow, number: int) -> _Kept:
        """What is kept of a row; a pair is its two sequences behind one another."""
        parts = [(part.input_ids[: self.max_length], part.is_label[: self.max_length]) for part in found.sequences]
        labels = np.concatenate([labels for _, labels in parts])
        second = len(parts[0][0]) if len(parts) > 1 else 0
        if second:
            labels[second] = False  # predicted by nothing, as the first token of the row
        return _Kept(
            ids=np.concatenate([ids for ids, _ in parts]),
            labels=labels,
            number=number,
            domain=found.row.domain,
            second=second,
            good=found.row.label is not False,
        )

    def beyond(self, found: TokenisedRow) -> str | None:
        """Why a row has a token that the backbone has no embedding for, or None."""
        ids = np.concatenate([part.input_ids[: self.max_length] for part in found.sequences])
        if self.num_embeddings is None or not len(ids) or (largest := int(ids.max())) < self.num_embeddings:
            return None
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return (
            f"it uses {quoted(token)} ({largest}); the tokenizer has {len(self.tokenizer)} tokens, the embedding of "
            f"the backbone {self.num_embeddings}: resize it, or use the tokenizer that it was trained with"
        )

    def nothing_to_learn(self, found: TokenisedRow) -> str | None:
        """Why nothing of a row can be learnt, so that it is dropped, or None; of a pair, where one answer is gone."""
        reasons = [self._nothing_in(part) for part in found.sequences]
        if any(reasons) or found.rejected is None:
            return next((reason for reason in reasons if reason), None)
        alike = np.array_equal(found.input_ids[: self.max_length], found.rejected.input_ids[: self.max_length])
        if not alike:
            return None
        whole = np.array_equal(found.input_ids, found.rejected.input_ids)
        return ALIKE if whole else f"{ALIKE} after truncation to {self.max_length}"

    def _nothing_in(self, found: TokenisedRow) -> str | None:
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
            if (reason := refused_by(self.kind, row)) is not None:
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
                found = [self.template.render(prefixed(part, self.prompt_prefix)) for part in self._sequences(row)]
                rendered.append((index, row, found))
            except DataError as error:
                if self.template.source is None:
                    raise
                yield index, error
        if not rendered:
            return
        texts = [r.text for _, _, found in rendered for r in found]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        every = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        for index, row, found in rendered:
            whole: TokenisedRow | None = None
            for r, (ids, offsets) in reversed(list(zip(found, [next(every) for _ in found], strict=True))):
                labels = token_labels(offsets, r.spans).numpy()
                account.turns += r.turns
                account.endless += r.endless
                account.shortened += r.shortened
                whole = TokenisedRow(row, np.asarray(ids, dtype=np.int32), labels, offsets, r.text, whole)
            assert whole is not None
            yield index, whole

    def _sequences(self, row: Row) -> tuple[Row, ...]:
        """The conversations that a row is: of a pair two, of which the answers alone are learnt."""
        if self.kind is RowKind.answers:
            return (row,)
        if self.kind is RowKind.labelled and row.format in PROMPT_APART:
            return (row,)
        if self.kind is RowKind.labelled:
            turns = row.messages or ()  # what tools say is within the answer
            last = max((i for i, turn in enumerate(turns) if turn["role"] not in ("assistant", "tool")), default=-1)
            return (replace(row, muted=row.muted | _assistant_turns(turns[:last])),) if last > 0 else (row,)
        return tuple(_answered(row, answer or ()) for answer in (row.chosen, row.rejected))

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
            yield index, TokenisedRow(row, np.asarray(ids, dtype=np.int32), labels, offsets, text)
