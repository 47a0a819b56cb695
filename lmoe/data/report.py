"""What preparing the data did, for people and for the provenance of a run."""

from dataclasses import dataclass

import torch

from lmoe.data.encoded import EncodedRows

PERCENTILES = (("min", 0.0), ("50 %", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("max", 1.0))


@dataclass(slots=True, kw_only=True)
class SourceReport:
    """One source: a file, a folder or a hub data set.

    Args:
        path: as given, or where the bundled rows are.
        key: digest of all that its tokenised rows depend on: the rows of its files in their order, tokenizer, template
            and length; not where they are.
        read: rows read.
        kept: rows that can be learnt from.
        dropped: rows left out, by reason.
        truncated: kept rows that were cut at the end.
        cache_hit: whether the tokenised rows came from the cache.
        cache_path: their file; None if it could not be written.
    """

    path: str
    key: str
    read: int
    kept: int
    dropped: dict[str, int]
    truncated: int
    cache_hit: bool
    cache_path: str | None


@dataclass(slots=True, kw_only=True)
class SplitReport:
    """The rows of one split.

    Args:
        rows: rows.
        tokens: tokens.
        label_tokens: tokens with a label.
        lengths: tokens in a row, by percentile.
        rows_by_domain: rows of each domain.
        packed_sequences: sequences after packing; None without.
        fill: tokens as a share of the packed sequences' room; None without packing.
    """

    rows: int
    tokens: int
    label_tokens: int
    lengths: dict[str, int]
    rows_by_domain: dict[str, int]
    packed_sequences: int | None = None
    fill: float | None = None


@dataclass(slots=True, kw_only=True)
class PrepareReport:
    """Everything `prepare` did.

    Args:
        sources: what was read; one, or training and validation.
        train, val: what each split holds.
        data_hashes: SHA-256 of each file (of the rows, for a hub data set) by path.
    """

    sources: list[SourceReport]
    train: SplitReport
    val: SplitReport
    data_hashes: dict[str, str]

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (what, training, validation), plain text."""
        train, val = self.train, self.val
        rows = [
            ("rows", f"{train.rows:,}", f"{val.rows:,}"),
            ("tokens", f"{train.tokens:,}", f"{val.tokens:,}"),
            ("label tokens", _with_share(train), _with_share(val)),
        ]
        rows += [(f"length, {name}", str(train.lengths[name]), str(val.lengths[name])) for name, _ in PERCENTILES]
        for domain in sorted({*train.rows_by_domain, *val.rows_by_domain}):
            counts = [f"{split.rows_by_domain.get(domain, 0):,}" for split in (train, val)]
            rows.append((f"rows of {domain}", counts[0], counts[1]))
        if train.packed_sequences is not None and train.fill is not None:
            rows.append(("packed sequences", f"{train.packed_sequences:,} ({train.fill:.1%} full)", "not packed"))
        return rows

    def lines(self) -> list[str]:
        """One sentence for each source: what was read, dropped and cut, and the cache."""
        lines = []
        for source in self.sources:
            line = f"{source.path}: {source.read:,} rows read, {source.kept:,} kept, {source.truncated:,} cut to length"
            for reason, count in source.dropped.items():
                line += f"; {count:,} dropped: {reason}"
            state = "hit" if source.cache_hit else "miss"
            lines.append(f"{line}; cache {state}, {source.cache_path or 'not written'}")
        return lines


def _with_share(split: SplitReport) -> str:
    """Label tokens, and in percent of all tokens."""
    return f"{split.label_tokens:,} ({split.label_tokens / split.tokens:.1%})"


def split_report(rows: EncodedRows, domains: list[str]) -> SplitReport:
    """Count the rows of a split that is not empty.

    Args:
        domains: names that rows.domains points into.
    """
    lengths = rows.lengths.sort().values
    counts = torch.bincount(rows.domains, minlength=len(domains)).tolist()
    return SplitReport(
        rows=len(rows),
        tokens=int(lengths.sum()),
        label_tokens=rows.label_tokens(),
        lengths={name: int(lengths[round(share * (len(lengths) - 1))]) for name, share in PERCENTILES},
        rows_by_domain={name: count for name, count in zip(domains, counts, strict=True) if count},
    )
