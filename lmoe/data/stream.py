"""Training samples of rows that are read while training: a seeded order that can be gone on with exactly.

A pass goes through the files in a seeded order. Some thousand rows make a block, whose rows are tokenised, packed and
shuffled among themselves: what a block holds depends on the seed and on where it begins, and so does everything behind
it. Shuffle buffers that are filled up again and again, as `datasets` has them, would have to be stored with the run.
Where a pass stands in its files, and which source is next where several are mixed, is kept by `datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmoe.data.account import Account
from lmoe.data.encode import Encoder
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.data.report import ignored_note, turn_notes, unprefixed
from lmoe.data.rows.row import Row
from lmoe.data.rows.sources import Part
from lmoe.errors import DataError, LmoeError
from lmoe.vocabulary import OnBadRow

COLUMNS = {
    name: {"_type": "Value", "dtype": kind}
    for name, kind in (
        *(("source", "int64"), ("part", "int64")),
        *(("where", "string"), ("record", "string"), ("problem", "string")),
    )
}
"""Of a record on its way through `datasets`; as JSON, or the keys of one would be those of all."""
OTHER_DOMAIN = "of domains that data.domains does not name"
"""Why a row is left out."""
Sample = EncodedRow | tuple[EncodedRow, ...]
MOST_PARTS = 256
"""That are opened to look at their first rows."""
ClusterOf = Callable[[EncodedRows], Tensor]
"""From N rows to the cluster of each one's prompt, (N,) int64."""
Samples = EncodedRows | PackedRows


@dataclass(slots=True, frozen=True)
class Place:
    """Where in a stream a sample stands.

    Args:
        epoch: passes done before.
        block: blocks of this pass before this one.
        reading: where in its files the block begins, JSON as `datasets` says it; "": at the beginning of the pass.
        sample: number in the block.
    """

    epoch: int = 0
    block: int = 0
    reading: str = ""
    sample: int = 0


@dataclass(slots=True, kw_only=True)
class Block:
    """Samples of a block in the order of training."""

    samples: Samples
    order: list[int]
    epoch: int
    number: int
    reading: str


class RowStream:
    """Endless training samples.

    Args:
        parts: of each source.
        shares: of each source among the rows; sum to 1.
        encoder: makes tokens of rows.
        domains: names that rows may have; samples point into it.
        buffer: rows of a block.
        seed: of the order.
        packing: whether a sample is a packed sequence.
        on_bad_row: what a row does that cannot be used.
        say: told how many rows of a pass were left out, and what of them is ignored or not learnt.
        only_these: rows of other domains are left out; else they are refused.

    Attributes:
        cluster_of: puts the rows of each block into clusters; None: they are in none.
    """

    cluster_of: ClusterOf | None = None

    def __init__(
        self,
        parts: Sequence[Sequence[Part]],
        shares: Sequence[float],
        encoder: Encoder,
        domains: Sequence[str],
        *,
        buffer: int,
        seed: int,
        packing: bool,
        on_bad_row: OnBadRow,
        say: Callable[[str], None],
        only_these: bool = False,
    ) -> None:
        self.only_these = only_these
        self.parts, self.shares, self.encoder = parts, shares, encoder
        self.domains = {name: number for number, name in enumerate(domains)}
        self.buffer, self.seed, self.packing, self.on_bad_row, self.say = buffer, seed, packing, on_bad_row, say

    def samples(self, start: Place) -> Iterator[tuple[Sample, Block, int]]:
        """Each sample from a place on, with its block and its number in the block's order.

        Raises:
            DataError: rows that cannot be read or used, or a whole pass without one.
        """
        skip, blocks = start.sample, self.blocks(start)
        while True:
            block = next(blocks)
            for number in range(skip, len(block.order)):
                yield block.samples[block.order[number]], block, number
            skip = 0
            del block  # before the next one is made

    def first_rows(self, count: int) -> EncodedRows:
        """About `count` rows, or what there is of them: the first ones of every file, so that none of them is left out;
        of more than MOST_PARTS files (and pieces of files) of a choice by the seed. Nothing is said of them.

        Raises:
            DataError: rows that cannot be read or used.
        """
        return self._encoded(self._first(count), Account())

    def first_domains(self, count: int) -> list[str]:
        """Sorted names of the domains of these rows.

        Raises:
            DataError: a file that cannot be read.
        """
        rows = self._first(count)
        return sorted({row.domain for row in rows if not isinstance(row, LmoeError)} & self.domains.keys())

    def _first(self, count: int) -> list[Row | LmoeError]:
        parts = [part for source in self.parts for part in source]
        chosen = np.random.default_rng(self.seed).permutation(len(parts))[:MOST_PARTS]
        each = -(-count // len(chosen))
        return [row for number in sorted(chosen) for row, _ in islice(parts[number].rows(), each)]

    def blocks(self, start: Place) -> Iterator[Block]:
        """Each block from a place on.

        Raises:
            DataError: as `samples`.
        """
        epoch, number, reading = start.epoch, start.block, start.reading
        told: set[tuple[str, str]] = set()
        while True:
            found, account = False, Account()
            rows = self._rows(epoch)
            if reading:
                rows.load_state_dict(json.loads(reading))
            iterator = iter(rows)
            while some := [self._row(found) for found in islice(iterator, self.buffer)]:
                begins, reading = reading, json.dumps(rows.state_dict())
                samples = self._samples(self._encoded(some, account), epoch, number)
                self._tell_new(account, told)
                if len(samples):
                    found = True
                    order = self._shuffled(len(samples), epoch, number)
                    yield Block(samples=samples, order=order, epoch=epoch, number=number, reading=begins)
                del some, samples  # before the next block is made
                number += 1
            if not found and not start.block:
                raise DataError(f"data.streaming: a pass over {account.read:,} rows gave none to learn from")
            self._tell(account, epoch)
            epoch, number, reading = epoch + 1, 0, ""

    def _rows(self, epoch: int) -> Any:
        """The rows of one pass, as a `datasets.IterableDataset`."""
        import datasets  # heavy, and only streams need it

        streams = []
        for source, parts in enumerate(self.parts):
            order = np.random.default_rng((self.seed, epoch, source)).permutation(len(parts))
            shuffled = [(source, int(number), parts[int(number)]) for number in order]
            streams.append(
                datasets.IterableDataset.from_generator(
                    _records_of, gen_kwargs={"parts": shuffled}, features=datasets.Features.from_dict(COLUMNS)
                )
            )
        if len(streams) == 1:
            return streams[0]
        return datasets.interleave_datasets(
            streams,
            probabilities=list(self.shares),
            seed=self.seed * 1_000_003 + epoch,
            stopping_strategy="all_exhausted",
        )

    def _row(self, found: dict[str, Any]) -> Row | LmoeError:
        """The row of a record, or why it is none."""
        if found["problem"]:
            return DataError(found["problem"])
        return self.parts[found["source"]][found["part"]].row(json.loads(found["record"]), found["where"])

    def _encoded(self, rows: Sequence[Row | LmoeError], account: Account) -> EncodedRows:
        kept: list[EncodedRow] = []
        if self.only_these:
            used = [row for row in rows if isinstance(row, LmoeError) or row.domain in self.domains]
            if others := len(rows) - len(used):
                account.read += others
                account.dropped[OTHER_DOMAIN] += others
            rows = used
        for chunk in self.encoder.chunks(((row, 0) for row in rows), place=0):
            account.add(chunk.account)
            if self.on_bad_row is OnBadRow.error:
                chunk.account.check()
            kept += chunk.rows(self._domain)
        encoded = EncodedRows.of(kept)
        if self.cluster_of is not None and kept:
            encoded = replace(encoded, clusters=self.cluster_of(encoded))
        return encoded

    def _samples(self, rows: EncodedRows, epoch: int, number: int) -> Samples:
        if self.packing and len(rows):
            return PackedRows.of(rows, self.encoder.max_length, self._seed_of(epoch, number))
        return rows

    def _domain(self, name: str) -> int:
        if name not in self.domains:
            raise DataError(
                f"data.streaming: a row is of the domain {name!r}, which no source, file or validation row has: it has "
                "to be known before; give a validation row of it, or leave `domain` out of the rows"
            )
        return self.domains[name]

    def _shuffled(self, count: int, epoch: int, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed_of(epoch, number))
        return torch.randperm(count, generator=generator).tolist()

    def _seed_of(self, epoch: int, number: int) -> int:
        return int(np.random.SeedSequence((self.seed, epoch, number)).generate_state(1, np.uint64)[0] >> 1)

    def _tell_new(self, account: Account, told: set[tuple[str, str]]) -> None:
        """Say what a user should know of the rows, each thing at the first block that shows it.

        Args:
            account: of the pass so far.
            told: what was said before; grows.
        """
        fields = {name for name in account.ignored if ("ignored", name) not in told}
        if fields:
            self.say(f"data: {ignored_note(fields)}")
        notes = {name: note for name, note in turn_notes(account).items() if (name, "") not in told}
        for note in notes.values():
            self.say(f"data: {note}")
        told |= {("ignored", name) for name in fields} | {(name, "") for name in notes}

    def _tell(self, account: Account, epoch: int) -> None:
        if account.unprefixed:
            self.say(f"data: pass {epoch + 1}: {unprefixed(account)}")
        left_out = account.bad + sum(account.dropped.values())
        if left_out:
            reasons = [f"{count:,} {reason}" for reason, count in sorted(account.dropped.items())]
            reasons += [f"{account.bad:,} cannot be used, such as {account.first_bad[0]}"] if account.bad else []
            self.say(f"data: pass {epoch + 1} left out {left_out:,} of {account.read:,} rows: {'; '.join(reasons)}")


def _records_of(parts: Sequence[tuple[int, int, Part]]) -> Iterator[dict[str, Any]]:
    """Records of parts, each with the number of its source and of its part there."""
    for source, number, part in parts:
        for record, where, _ in part.records:
            text, problem = ("", record) if isinstance(record, LmoeError) else _as_json(record, where, part)
            yield {
                "source": source,
                "part": number,
                "where": where,
                "record": text,
                "problem": "" if problem is None else str(problem),
            }


def _as_json(record: Mapping[str, Any], where: str, part: Part) -> tuple[str, LmoeError | None]:
    """A record as JSON, and why it is no row where JSON does not tell: a date of a table would come back as text."""
    try:
        return json.dumps(record), None
    except TypeError:
        row = part.row(record, where)
        return json.dumps(record, default=str), row if isinstance(row, LmoeError) else None


class StreamLoader:
    """Micro-batches of this rank for the whole run, resumable.

    Every rank reads all rows and takes its micro-batches as `SeededBatches` deals them, so that W ranks see in one step
    what one process sees in W accumulated micro-batches. A whole optimizer step is read before its first micro-batch,
    so that its totals are known.

    Args:
        stream: the samples.
        collate: makes a batch of samples.
        units: units of the objective of each of some samples, (N,) int64.
        batch_size: samples of a micro-batch.
        micro_batches: of an optimizer step on one rank.
        num_batches: micro-batches of this rank in the whole run.
        rank, world_size: this process among all.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        collate: Callable[[Sequence[Any]], dict[str, Tensor]],
        units: Callable[[Samples], Tensor],
        batch_size: int,
        micro_batches: int,
        num_batches: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.stream, self._collate, self._units = stream, collate, units
        self.batch_size, self.micro_batches, self.num_batches = batch_size, micro_batches, num_batches
        self.rank, self.world_size = rank, world_size
        self._yielded, self._step, self._window = 0, 0, Place()
        self._totals: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        done = self._yielded - self._step * self.micro_batches
        samples = self.stream.samples(self._window)
        counted: tuple[Block, Tensor] | None = None
        for step in range(self._step, -(-self.num_batches // self.micro_batches)):
            window, behind = [], self._window
            units = tokens = 0
            for sample, block, number in islice(samples, self.batch_size * self.micro_batches * self.world_size):
                if not window:
                    self._window = Place(block.epoch, block.number, block.reading, number)
                if counted is None or counted[0] is not block:
                    counted = block, self._units(block.samples)
                units += int(counted[1][block.order[number]])
                tokens += int(block.samples.lengths[block.order[number]])
                window.append(sample)
                if number == len(block.order) - 1:
                    counted = None
                behind = Place(block.epoch, block.number, block.reading, number + 1)
                del sample, block  # before the next one is made
            self._totals = {step: (units, tokens)}
            for micro in range(done, self.micro_batches):
                first = (micro * self.world_size + self.rank) * self.batch_size
                self._yielded += 1
                if micro == self.micro_batches - 1:  # the next step may have another number of micro-batches
                    self._step, self._window = step + 1, behind
                yield self._collate(window[first : first + self.batch_size])
            done = 0

    def window_totals(self, step: int) -> tuple[int, int]:
        """(units, valid tokens) of the optimizer step under way, over all its micro-batches and ranks."""
        return self._totals[step]

    def largest_batch(self) -> dict[str, Tensor]:
        """A micro-batch of the longest samples of the first block."""
        block = next(self.stream.blocks(Place()))
        longest = block.samples.lengths.argsort(descending=True)[: self.batch_size].tolist()
        return self._collate([block.samples[index] for index in longest])

    def state_dict(self) -> dict[str, Any]:
        place = self._window
        return {
            "yielded": self._yielded,
            "step": self._step,
            "epoch": place.epoch,
            "block": place.block,
            "reading": place.reading,
            "sample": place.sample,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._yielded, self._step = state["yielded"], state["step"]
        self._window = Place(state["epoch"], state["block"], state["reading"], state["sample"])
