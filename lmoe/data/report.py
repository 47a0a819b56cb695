"""What preparing the data did, for people and for the provenance of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lmoe.data.account import Account
from lmoe.data.domains import names_of
from lmoe.data.encoded import EncodedRows
from lmoe.files.wording import shown

NAMED = 10
"""Fields and files that a note names."""
PERMUTED = "domains were dealt anew among the rows (data.permute_domains): what is said of a domain is of a false one"
PERCENTILES = (("min", 0.0), ("50 %", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("max", 1.0))


@dataclass(slots=True, kw_only=True)
class SourceReport:
    """One source: a file, a folder or a hub data set.

    Args:
        path: as given, or where the bundled rows are.
        key: digest of all that its tokenised rows depend on: the rows of its files in their order, tokenizer, template
            and length; not where they are.
        account: what became of its records.
        kept: rows that can be learnt from.
        unread: files of a folder that are not read.
        cache_hit: whether the tokenised rows came from the cache.
        cache_path: their file; None if it could not be written.
        files: or the one name of a data set, as the places of rows count them; of one that is streamed none.
        streamed: whether it is read while training, so that nothing is known of its rows.
    """

    path: str
    key: str
    account: Account
    kept: int
    unread: list[str]
    cache_hit: bool
    cache_path: str | None
    files: Sequence[str] = ()
    streamed: bool = False

    @property
    def formats(self) -> str:
        """The formats of its rows, in words."""
        counts = [f"{name} ({count:,})" for name, count in sorted(self.account.formats.items())]
        return f"format{'s' * (len(counts) != 1)}: {', '.join(counts)}"


@dataclass(slots=True, kw_only=True)
class SplitReport:
    """The rows of one split.

    Args:
        rows: rows.
        tokens: tokens.
        label_tokens: tokens with a label.
        lengths: tokens in a row, by percentile; of a pair of answers in each of its two sequences.
        rows_by_domain: rows of each domain.
        duplicates: rows whose tokens another one before them has.
        packed_sequences: sequences after packing; None without.
        fill: tokens as a share of the packed sequences' room; None without packing.
        pairs: rows that are pairs of answers.
        bad: rows whose answer is marked as a bad one.
    """

    rows: int
    tokens: int
    label_tokens: int
    lengths: dict[str, int]
    rows_by_domain: dict[str, int]
    duplicates: int
    packed_sequences: int | None = None
    fill: float | None = None
    pairs: int = 0
    bad: int = 0


@dataclass(slots=True, kw_only=True)
class LeftOut:
    """Rows of other domains than those of data.domains.

    Args:
        train, val: how many; train None: they are read, and left out, while training.
        domains: theirs, as far as they are known.
    """

    train: int | None
    val: int
    domains: list[str]

    def note(self) -> str:
        """How many, in words."""
        others = f" of other domains: {names_of(self.domains)}" if self.domains else ""
        if self.train is None:
            return f"data.domains leaves out {self.val:,} validation rows, and training rows as they are read{others}"
        return f"data.domains leaves out {self.train:,} training and {self.val:,} validation rows{others}"


@dataclass(slots=True, kw_only=True)
class PrepareReport:
    """Everything `prepare` did.

    Args:
        sources: what was read; one, or training and validation.
        train, val: what each split holds; train None: it is read while training.
        data_hashes: SHA-256 of each file (of the rows, for a data set) by path.
        leaked: validation rows whose tokens a training row has too.
        mixed: what an epoch of training holds where sources or domains are mixed; None: the training rows.
        not_packed: why rows are not packed though nothing was said against it; None: they are, or need not be.
        left_out: rows of other domains than those of data.domains; None: rows of all domains are used.
        permuted: whether domains were dealt anew.
    """

    sources: list[SourceReport]
    train: SplitReport | None
    val: SplitReport
    data_hashes: dict[str, str]
    leaked: int = 0
    mixed: SplitReport | None = None
    not_packed: str | None = None
    left_out: LeftOut | None = None
    permuted: bool = False

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (what, training, validation), plain text."""
        columns = [self.val] if self.train is None else [self.train, self.val]
        rows = [
            ("rows", [f"{split.rows:,}" for split in columns]),
            *((name, [f"{count:,}" for count in counts]) for name, counts in _answers(columns)),
            ("tokens", [f"{split.tokens:,}" for split in columns]),
            ("label tokens", [_with_share(split) for split in columns]),
            ("duplicate rows", [f"{split.duplicates:,}" for split in columns]),
        ]
        rows += [(f"length, {name}", [str(split.lengths[name]) for split in columns]) for name, _ in PERCENTILES]
        for domain in sorted({name for split in columns for name in split.rows_by_domain}):
            rows.append((f"rows of {domain}", [f"{split.rows_by_domain.get(domain, 0):,}" for split in columns]))
        train = self.train
        if train is not None and train.packed_sequences is not None and train.fill is not None:
            rows.append(("packed sequences", [f"{train.packed_sequences:,} ({train.fill:.1%} full)", "not packed"]))
        return [(name, "read while training" if train is None else cells[0], cells[-1]) for name, cells in rows]

    def lines(self) -> list[str]:
        """One sentence for each source: what was read, dropped and cut, and the cache; then what is to be known."""
        lines = []
        for source in self.sources:
            account = source.account
            if source.streamed:
                lines.append(f"{source.path}: read while training")
                continue
            line = (
                f"{source.path}: {account.read:,} rows read, {source.kept:,} kept, {account.truncated:,} cut to length"
            )
            for reason, count in sorted(account.dropped.items()):
                line += f"; {count:,} dropped: {reason}"
            line += f"; {source.formats}"
            state = "hit" if source.cache_hit else "miss"
            lines.append(f"{line}; cache {state}, {source.cache_path or 'not written'}")
        return lines + self.notes()

    def notes(self) -> list[str]:
        """What a user should know of the rows before training on them."""
        notes = []
        for source in self.sources:
            account = source.account
            if account.bad:
                notes.append(
                    f"{source.path}: {account.bad:,} of {account.read:,} rows cannot be used and are left out: "
                    f"{account.first_bad[0]}"
                )
            if account.ignored:
                notes.append(f"{source.path}: {ignored_note(account.ignored)}")
            if source.unread:
                notes.append(f"{source.path}: files that are not read: {_names(source.unread)}")
            notes += [f"{source.path}: {note}" for note in turn_notes(account).values()]
            if account.unprefixed:
                notes.append(f"{source.path}: {unprefixed(account)}")
        if self.left_out is not None:
            notes.append(self.left_out.note())
        if self.permuted:
            notes.append(PERMUTED)
        if self.train is not None and self.train.duplicates:
            notes.append(
                f"{self.train.duplicates:,} of {self.train.rows:,} training rows repeat the tokens of another one"
            )
        if self.leaked:
            notes.append(
                f"{self.leaked:,} of {self.val.rows:,} validation rows are training rows too; the validation loss "
                "looks better than it is"
            )
        if self.mixed is not None:
            parts = [f"{name} {count / self.mixed.rows:.0%}" for name, count in self.mixed.rows_by_domain.items()]
            notes.append(f"an epoch of the mixture has {self.mixed.rows:,} rows: {', '.join(parts)}")
        if self.train is not None and self.train.packed_sequences is not None and self.train.fill is not None:
            rows = self.train.rows if self.mixed is None else self.mixed.rows
            notes.append(
                f"{rows:,} rows are packed into {self.train.packed_sequences:,} sequences, {self.train.fill:.0%} full"
            )
        if self.not_packed is not None:
            notes.append(f"rows are not packed: {self.not_packed}")
        return notes


def ignored_note(fields: Iterable[str]) -> str:
    """Which fields of rows are ignored."""
    return f"fields that are ignored: {_names(sorted(fields))}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(shown(name or '""') for name in names[:NAMED]) + more


def turn_notes(account: Account) -> dict[str, str]:
    """What a user should know of the assistant's turns, by the field of the account that it is about."""
    notes = {}
    if account.shortened:
        notes["shortened"] = (
            f"{_turns(account.shortened)} shortened by the chat template, which leaves out a part of what the rows say"
        )
    if account.endless:
        notes["endless"] = (
            f"the end of {account.endless:,} of {_turns(account.turns)} is not learnt: the chat template writes none, "
            "or leaves it out of {% generation %}; the model will not learn to stop"
        )
    return notes


def _turns(count: int) -> str:
    return f"{count:,} turn{'s' * (count != 1)} of the assistant"


def unprefixed(account: Account) -> str:
    """Says that some rows have no place for data.prompt_prefix."""
    return (
        f"{account.unprefixed:,} of {account.read:,} rows have no message of the user, so data.prompt_prefix is not "
        "put before them"
    )


def stream_report(path: str, key: str, unread: list[str]) -> SourceReport:
    """Return the report of a source that is read while training."""
    return SourceReport(
        path=path, key=key, account=Account(), kept=0, unread=unread, cache_hit=False, cache_path=None, streamed=True
    )


def _answers(splits: Sequence[SplitReport]) -> list[tuple[str, list[int]]]:
    """Pairs of each split, or good and bad answers, where there are some."""
    kinds = {
        "pairs of answers": [split.pairs for split in splits],
        "bad answers": [split.bad for split in splits],
    }
    return [(name, counts) for name, counts in kinds.items() if any(counts)]


def _with_share(split: SplitReport) -> str:
    """Label tokens, and in percent of all tokens."""
    return f"{split.label_tokens:,} ({split.label_tokens / split.tokens:.1%})"


def split_report(rows: EncodedRows, domains: list[str]) -> SplitReport:
    """Count the rows of a split that is not empty.

    Args:
        domains: names that rows.domains points into.
    """
    second = (rows.lengths - rows.seconds)[rows.seconds > 0]
    lengths = torch.cat([torch.where(rows.seconds > 0, rows.seconds, rows.lengths), second]).sort().values
    counts = torch.bincount(rows.domains, minlength=len(domains)).tolist()
    return SplitReport(
        rows=len(rows),
        tokens=int(lengths.sum()),
        label_tokens=rows.label_tokens(),
        lengths={name: int(lengths[round(share * (len(lengths) - 1))]) for name, share in PERCENTILES},
        rows_by_domain={name: count for name, count in zip(domains, counts, strict=True) if count},
        duplicates=len(rows) - len(rows.digests.unique()),
        pairs=len(second),
        bad=int((rows.good == 0).sum()),
    )
