"""What training sees of a row: its tokens, which of them are learnt, where the assistant's turns end, what is cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.account import Account
from lmoe.data.chats.spans import Span
from lmoe.data.encode import Encoder, TokenisedRow
from lmoe.data.reader import Reader
from lmoe.data.rows.row import Row
from lmoe.data.rows.sources import open_source, sources_of
from lmoe.errors import DataError, LmoeError
from lmoe.files.places import cache_folder
from lmoe.vocabulary import RowKind

MOST_CUT = 100
"""Tokens behind the cut that a sample keeps; of the others it knows the number."""
CONTEXT = 4
"""Tokens before one that a decoder is given with it, so that it writes the space between them."""
BROKEN = "\ufffd"
"""What a decoder writes for a part of a character."""


@dataclass(slots=True, frozen=True)
class ShownToken:
    """One token of a sample.

    Args:
        text: the characters that it adds to the tokens before it; empty where it is a further part of a character that
            an earlier one began.
        id: its number in the vocabulary.
        learnt: whether the loss is taken on it.
        special: whether it is a special token of the tokenizer.
        cut: whether it lies behind data.max_length, where training does not see it.
    """

    text: str
    id: int
    learnt: bool
    special: bool
    cut: bool


@dataclass(slots=True, frozen=True, kw_only=True)
class ShownSample:
    """One row as training sees it.

    Args:
        where: file and line, or data set and row.
        domain: of the row; empty of a record that is no row.
        tokens: all that training sees, and the first MOST_CUT of those that are cut; none of a row that is refused.
        turns: the assistant's turns that are learnt; 1 for plain text.
        turn_ends: index in the row of the token that ends each of these turns, where there is one.
        cut: tokens behind data.max_length.
        note: why the row is dropped or refused; empty for one that is trained on.
        ignored: fields of the row that nothing is made of.
        answer: which answer of its row it ends with, in words; empty of rows whose turns are learnt by themselves.
        of_row_before: whether the sample before it shows the same row, with its other answer.
    """

    where: str
    domain: str
    tokens: tuple[ShownToken, ...] = ()
    turns: int = 0
    turn_ends: tuple[int, ...] = ()
    cut: int = 0
    note: str = ""
    ignored: tuple[str, ...] = ()
    answer: str = ""
    of_row_before: bool = False

    @property
    def kept(self) -> int:
        """Tokens that training sees."""
        return sum(not token.cut for token in self.tokens)

    @property
    def learnt(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(token.learnt for token in self.tokens)

    @property
    def ends_learnt(self) -> int:
        """Turns whose end is learnt, so that the model learns to stop."""
        return sum(end < len(self.tokens) and self.tokens[end].learnt for end in self.turn_ends)


def show_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bundled: Path,
    count: int,
    kind: RowKind = RowKind.answers,
) -> list[ShownSample]:
    """The first `count` training rows of each domain, domain by domain, before any are held out for validation; a pair
    of answers is two samples.

    Args:
        kind: of what is learnt.
        bundled: folder of what ships with lmoe, as `sources_of`.

    Raises:
        DataError: rows that cannot be read.
    """
    reader = Reader(config, tokenizer, kind=kind)
    encoder = reader.encoder()
    cache = cache_folder(config.cache_dir)
    parts = [part for source in sources_of(config, bundled) for part in open_source(source, cache, kind=kind).parts]
    found = [row for part in parts for row, _ in part.rows()]
    refused = [row for row in found if isinstance(row, LmoeError)][:count]
    shown = [sample for row in first_rows(found, count) for sample in show_answers(row, encoder)]
    return [*shown, *map(_show_refused, refused)]


def first_rows(rows: Iterable[Row | LmoeError], count: int) -> list[Row]:
    """The first `count` rows of each domain, domains by name; those that are none are passed over."""
    by_domain: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, LmoeError):
            continue
        chosen = by_domain.setdefault(row.domain, [])
        if len(chosen) < count:
            chosen.append(row)
    return [row for domain in sorted(by_domain) for row in by_domain[domain]]


def show_answers(row: Row, encoder: Encoder) -> list[ShownSample]:
    """One row as `encoder` makes a training row of it, or why it makes none; of a pair prompt and chosen answer, and
    then prompt and rejected answer, whether they are learnt together or apart."""
    rows = [one for one, _ in encoder.answers_apart([(row, 0)]) if isinstance(one, Row)]
    samples = [sample for one in rows for sample in _show(one, encoder)]
    return [replace(sample, of_row_before=number > 0) for number, sample in enumerate(samples)]


def _show(row: Row, encoder: Encoder) -> list[ShownSample]:
    """A sample for each sequence of a row, or one that says why there is none."""
    try:
        [tokenised] = encoder.tokenise([row], Account())
        if isinstance(tokenised, LmoeError):
            raise tokenised
        if (beyond := encoder.beyond(tokenised)) is not None:
            raise DataError(beyond)
    except LmoeError as error:
        reason = str(error).removeprefix(f"{row.where}: ")
        return [ShownSample(where=row.where, domain=row.domain, note=f"refused: {reason}", ignored=row.ignored)]
    dropped, names = encoder.nothing_to_learn(tokenised), _answer_names(row, encoder.kind)
    return [
        _show_sequence(sequence, encoder, dropped, answer)
        for sequence, answer in zip(tokenised.sequences, names, strict=True)
    ]


def _answer_names(row: Row, kind: RowKind) -> tuple[str, ...]:
    """What the answer of each sequence of a row is called."""
    match kind:
        case RowKind.pairs:
            return ("chosen answer", "rejected answer")
        case RowKind.labelled:
            return ("bad answer",) if row.label is False else ("good answer",)
    return ("",)


def _show_sequence(tokenised: TokenisedRow, encoder: Encoder, dropped: str | None, answer: str) -> ShownSample:
    """One sequence of a row.

    Args:
        dropped: why nothing of the row is learnt, or None.
        answer: what it ends with.
    """
    row = tokenised.row
    texts = token_texts(tokenised, encoder.tokenizer)
    labels = tokenised.is_label.tolist()
    special = special_ids(encoder.tokenizer)
    tokens = tuple(
        ShownToken(
            text=texts[i],
            id=number,
            learnt=dropped is None and 0 < i < encoder.max_length and labels[i],
            special=number in special,
            cut=i >= encoder.max_length,
        )
        for i, number in enumerate(tokenised.input_ids[: encoder.max_length + MOST_CUT].tolist())
    )
    turns = [] if answer and dropped is not None else _label_runs(labels)
    names = encoder.template.turn_ends()
    ends = [_turn_end(turn, tokenised.input_ids.tolist(), texts, names, encoder.tokenizer) for turn in turns]
    return ShownSample(
        where=row.where,
        domain=row.domain,
        tokens=tokens,
        turns=len(turns),
        turn_ends=tuple(end for end in ends if end is not None),
        cut=max(0, len(tokenised.input_ids) - encoder.max_length),
        note="" if dropped is None else f"dropped: {dropped}",
        ignored=row.ignored,
        answer=answer,
    )


def _show_refused(error: LmoeError) -> ShownSample:
    """A record that is no row, and so of no domain."""
    where, _, reason = str(error).partition(": ")
    return ShownSample(where=where, domain="", note=f"refused: {reason}")


def token_texts(row: TokenisedRow, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The characters that each token adds to those before it; joined they are the row's text and the special tokens
    that the tokenizer adds to it.

    A character of several tokens belongs to the first of them, and the others have none.
    """
    if row.offsets is None:
        return decoded_texts(row.input_ids.tolist(), tokenizer)
    special, texts, written = special_ids(tokenizer), [], 0
    for number, (start, end) in zip(row.input_ids.tolist(), row.offsets, strict=True):
        if start == end and number in special:
            texts.append(_name(number, tokenizer))
        else:
            texts.append(row.text[written : max(written, end)])
            written = max(written, end)
    return texts


def decoded_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What `token_texts` returns, from the ids alone, which do not tell the characters that tokens stand for."""
    special, texts, first = special_ids(tokenizer), [""] * len(ids), 0
    for i, number in enumerate(ids):
        if number in special:
            texts[i], first = _name(number, tokenizer), i + 1
            continue
        before = list(ids[max(0, first - CONTEXT) : first])
        head = _decode(before, tokenizer)
        whole = _decode([*before, *ids[first : i + 1]], tokenizer)
        unfinished = whole.endswith(BROKEN) or len(whole) <= len(head)
        if unfinished and i + 1 < len(ids) and ids[i + 1] not in special:
            continue
        texts[first], first = whole[len(head) :], i + 1
    return texts


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _name(number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.convert_ids_to_tokens(number))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Numbers of the special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _label_runs(labels: Sequence[bool]) -> list[Span]:
    """(first, behind the last) of each unbroken run of tokens to be learnt."""
    edges = [i for i in range(len(labels) + 1) if (i > 0 and labels[i - 1]) != (i < len(labels) and labels[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _turn_end(
    turn: Span, ids: Sequence[int], texts: Sequence[str], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Index of the token that ends a turn: the last of the turn, or the next one behind it, but for white space.

    Args:
        turn: its first token, and the one behind its last.
        names: texts of the tokens that the template ends turns with.
    """
    first, behind = turn
    last = next((i for i in range(behind - 1, first - 1, -1) if texts[i].strip()), first)
    if texts[last].strip() in names or ids[last] in special_ids(tokenizer):
        return last
    after = next((i for i in range(behind, len(ids)) if texts[i].strip()), None)
    if after is not None and (texts[after].strip() in names or ids[after] == tokenizer.eos_token_id):
        return after
    return None
