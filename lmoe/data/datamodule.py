"""The LightningDataModule of fine-tuning: resumable training batches, validation batches with little padding."""

import atexit
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lmoe.config.data import DataConfig
from lmoe.data.encoded import EncodedRows
from lmoe.data.order import ResumableLoader, SeededBatches, SwitchingLoader
from lmoe.data.pack import PackedRows
from lmoe.data.prepare import PreparedData
from lmoe.data.stream import RowStream, Samples, StreamLoader

MakeCollate = Callable[..., Callable[[Sequence[Any]], dict[str, Tensor]]]


@dataclass(slots=True, frozen=True)
class SampleSizes:
    """What each sample (row, or packed sequence) adds to an optimizer step.

    Args:
        lengths: (N,) int64 tokens.
        units: (N,) int64 units of the objective, such as tokens that carry a label.
    """

    lengths: Tensor
    units: Tensor

    def window(self, batches: SeededBatches, step: int, micro_batches: int) -> tuple[int, int]:
        """(units, tokens) of an optimizer step over all its micro-batches and ranks.

        Args:
            batches: the training order.
            step: optimizer steps done before.
            micro_batches: of one optimizer step on one rank.
        """
        samples = micro_batches * batches.world_size * batches.batch_size
        indices = [batches.index(position) for position in range(step * samples, (step + 1) * samples)]
        return int(self.units[indices].sum()), int(self.lengths[indices].sum())

    def largest(self, batches: SeededBatches) -> list[int]:
        """Indices of the micro-batch of this rank that holds the longest sample: it takes the most memory."""
        return max(iter(batches), key=lambda indices: int(self.lengths[indices].max()))


@dataclass(slots=True, kw_only=True)
class SampleSet:
    """Rows, and what an objective makes of them.

    Args:
        prepared: rows.
        config: batch size, length and worker processes.
        units: how many units of the objective each of N samples holds, (N,) int64.
        collate: makes a batch of samples, of the padding token, the largest length, and whether they are packed.
    """

    prepared: PreparedData
    config: DataConfig
    units: Callable[[Samples], Tensor]
    collate: MakeCollate
    _sizes: SampleSizes | None = None

    @property
    def rows(self) -> EncodedRows | PackedRows | None:
        """The training samples; None: they are read while training."""
        return None if isinstance(self.prepared.train, RowStream) else self.prepared.train

    @property
    def sizes(self) -> SampleSizes | None:
        """What each training sample adds to a step; None: of a stream that is not known."""
        if self._sizes is None and self.rows is not None:
            self._sizes = SampleSizes(self.rows.lengths, self.units(self.rows))
        return self._sizes


class TrainingData(LightningDataModule):
    """Batches of samples, as the objective lays them out.

    A run whose phases have rows of their own has several sets of samples: `follow` says which of them a step takes.

    Every rank validates all rows: the same figures under every strategy, and no collective call that one rank misses.
    The Trainer needs use_distributed_sampler=False, because the training order already knows its rank.

    Args:
        prepared: rows.
        config: batch size, length and worker processes.
        units: how many units of the objective each of N samples holds, (N,) int64.
        collate: makes a batch of samples, of the padding token, the largest length, and whether they are packed.
        seed: of the training order.
        max_steps: optimizer steps of the whole run.
        accumulate_grad_batches: micro-batches in one optimizer step.
        pad_token_id: fills the padding.
        others: more sets of samples, numbered from 1; that of the other arguments is number 0.
    """

    def __init__(
        self,
        prepared: PreparedData,
        config: DataConfig,
        *,
        units: Callable[[Samples], Tensor],
        collate: MakeCollate,
        seed: int,
        max_steps: int,
        accumulate_grad_batches: int,
        pad_token_id: int,
        others: Sequence[SampleSet] = (),
    ) -> None:
        super().__init__()
        self.sets = [SampleSet(prepared=prepared, config=config, units=units, collate=collate), *others]
        self.seed, self.num_batches, self.pad_token_id = seed, max_steps * accumulate_grad_batches, pad_token_id
        self.micro_batches = accumulate_grad_batches
        self._window_orders: dict[int, SeededBatches] = {}
        self._window: tuple[tuple[int, int], tuple[int, int]] | None = None  # of which set and step, and its totals
        self._stream: StreamLoader | None = None
        self._set_of_step: Callable[[int], int] = lambda step: 0
        self._set_now: Callable[[], int] = lambda: 0

    def follow(self, set_of_step: Callable[[int], int], set_now: Callable[[], int]) -> None:
        """Take the samples of a step, and those to validate on, from the sets that a run says.

        Args:
            set_of_step: number of the set that an optimizer step takes; asked when the step begins.
            set_now: of the phase under way.
        """
        self._set_of_step, self._set_now = set_of_step, set_now

    @property
    def prepared(self) -> PreparedData:
        """The rows of set 0."""
        return self.sets[0].prepared

    @property
    def set_now(self) -> int:
        """Number of the set that the phase under way takes its samples from."""
        return self._set_now()

    def take(self, prepared: PreparedData) -> None:
        """The rows of set 0 in other clusters; NOTE before any batch is made."""
        self.sets[0].prepared = prepared

    def train_dataloader(self) -> "ResumableLoader | StreamLoader | SwitchingLoader":
        """Micro-batches of this rank for the whole run, resumable by their number."""
        if isinstance(self.prepared.train, RowStream):
            self._stream = self._stream_loader(self.prepared.train)
            return self._stream
        loaders = [self._loader(samples) for samples in self.sets]
        if len(loaders) == 1:
            return loaders[0]
        return SwitchingLoader(loaders, lambda batch: self._set_of_step(batch // self.micro_batches))

    def _loader(self, samples: SampleSet) -> ResumableLoader:
        assert samples.rows is not None
        return ResumableLoader(
            samples.rows,
            self._order(samples),
            generator=torch.Generator(),  # its own, or the worker's seed would come out of the dropout's
            collate_fn=self._collate(samples, packed=isinstance(samples.rows, PackedRows)),
            num_workers=samples.config.num_workers,
            persistent_workers=samples.config.num_workers > 0,
            worker_init_fn=_ignore_signals,
        )

    def val_dataloader(self) -> DataLoader:
        """All validation rows of the phase under way once, longest last, so that rows of like length share a batch."""
        samples = self.sets[self.set_now]
        val = samples.prepared.val
        return DataLoader(
            val.subset(val.lengths.argsort(stable=True)),
            generator=torch.Generator(),
            batch_size=samples.config.batch_size,
            collate_fn=self._collate(samples, packed=False),
            num_workers=samples.config.num_workers,
            persistent_workers=samples.config.num_workers > 0,
            worker_init_fn=_ignore_signals,
        )

    def every_row(self) -> DataLoader:
        """Each row of the phase under way, to train or to validate on, once for its tokens and domain; no stream."""
        samples = self.sets[self.set_now]
        train = samples.prepared.train_rows
        assert train is not None
        rows = EncodedRows.joined([train, samples.prepared.val])
        first: dict[tuple[int, int], int] = {}
        for index, key in enumerate(zip(rows.digests.tolist(), rows.domains.tolist(), strict=True)):
            first.setdefault(key, index)
        once = rows.subset(list(first.values()))
        return DataLoader(
            once.subset(once.lengths.argsort(stable=True)),
            generator=torch.Generator(),
            batch_size=samples.config.batch_size,
            collate_fn=self._collate(samples, packed=False),
        )

    def window_totals(self, step: int) -> tuple[int, int]:
        """(units, valid tokens) of an optimizer step, over all its micro-batches and ranks.

        NOTE each of the micro-batches asks, and what is counted is all of them: so it is counted once.
        """
        number = self._set_of_step(step)
        if self._window is None or self._window[0] != (number, step):
            self._window = (number, step), self._counted_window(number, step)
        return self._window[1]

    def _counted_window(self, number: int, step: int) -> tuple[int, int]:
        samples = self.sets[number]
        if samples.sizes is None:
            assert self._stream is not None
            return self._stream.window_totals(step)
        if number not in self._window_orders:
            self._window_orders[number] = self._order(samples)
        return samples.sizes.window(self._window_orders[number], step, self.micro_batches)

    def largest_batch(self, number: int = 0) -> dict[str, Tensor]:
        """The micro-batch of a set that takes the most memory; of a stream one of the first block."""
        samples = self.sets[number]
        if samples.sizes is None or samples.rows is None:
            assert isinstance(samples.prepared.train, RowStream)
            return self._stream_loader(samples.prepared.train).largest_batch()
        items = [samples.rows[index] for index in samples.sizes.largest(self._order(samples))]
        return self._collate(samples, packed=isinstance(samples.rows, PackedRows))(items)

    def _stream_loader(self, stream: RowStream) -> StreamLoader:
        rank, world_size = self._rank()
        samples = self.sets[0]
        return StreamLoader(
            stream,
            collate=self._collate(samples, packed=stream.packing),
            units=samples.units,
            batch_size=samples.config.batch_size,
            micro_batches=self.micro_batches,
            num_batches=self.num_batches,
            rank=rank,
            world_size=world_size,
        )

    def _order(self, samples: SampleSet) -> SeededBatches:
        assert samples.rows is not None
        rank, world_size = self._rank()
        return SeededBatches(
            len(samples.rows), samples.config.batch_size, self.num_batches, self.seed, rank, world_size
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _collate(self, samples: SampleSet, *, packed: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        return samples.collate(pad_token_id=self.pad_token_id, max_length=samples.config.max_length, packed=packed)


def _ignore_signals(worker: int) -> None:
    """A signal to all processes of a run is for the main one, which may need more batches; workers end with it.

    NOTE handlers hold for all threads, and W&B starts some in each fork; masks do not.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if multiprocessing.get_start_method() == "fork":
        signal.signal(signal.SIGTERM, _end_with_the_main_process)


def _end_with_the_main_process(signum: int, frame: FrameType | None) -> None:
    """End at once where the main process ends, which sends SIGTERM to its workers and waits for them."""
    if _main_ends[0]:
        os._exit(0)


_main_ends = mmap.mmap(-1, 1)
"""One byte that forks share with the process that they were made by."""
atexit.register(_main_ends.__setitem__, 0, 1)  # after multiprocessing's, so it runs before that one
