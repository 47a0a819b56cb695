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
from lmoe.data.order import ResumableLoader, SeededBatches
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


class TrainingData(LightningDataModule):
    """Batches of samples, as the objective lays them out.

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
    ) -> None:
        super().__init__()
        self.prepared, self.config = prepared, config
        self.seed, self.num_batches, self.pad_token_id = seed, max_steps * accumulate_grad_batches, pad_token_id
        self.micro_batches, self._units, self._make_collate = accumulate_grad_batches, units, collate
        self._rows = None if isinstance(prepared.train, RowStream) else prepared.train
        self._sizes = None if self._rows is None else SampleSizes(self._rows.lengths, units(self._rows))
        self._window_order: SeededBatches | None = None
        self._stream: StreamLoader | None = None

    def take_clusters(self, train: Tensor, val: Tensor) -> None:
        """Put the rows into other clusters; arguments as `PreparedData.with_clusters` has them."""
        self.prepared = self.prepared.with_clusters(train, val)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Micro-batches of this rank for the whole run, resumable by their number."""
        train = self.prepared.train
        if isinstance(train, RowStream):
            self._stream = self._stream_loader(train)
            return self._stream
        return ResumableLoader(
            train,
            self._order(),
            generator=torch.Generator(),  # its own, or the worker's seed would come out of the dropout's
            collate_fn=self._collate(packed=isinstance(train, PackedRows)),
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            worker_init_fn=_ignore_signals,
        )

    def val_dataloader(self) -> DataLoader:
        """All validation rows once, longest last, so that rows of like length share a batch."""
        val = self.prepared.val
        return DataLoader(
            val.subset(val.lengths.argsort(stable=True)),
            generator=torch.Generator(),
            batch_size=self.config.batch_size,
            collate_fn=self._collate(packed=False),
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            worker_init_fn=_ignore_signals,
        )

    def window_totals(self, step: int) -> tuple[int, int]:
        """(units, valid tokens) of an optimizer step, over all its micro-batches and ranks."""
        if self._sizes is None:
            assert self._stream is not None
            return self._stream.window_totals(step)
        if self._window_order is None:
            self._window_order = self._order()
        return self._sizes.window(self._window_order, step, self.micro_batches)

    def largest_batch(self) -> dict[str, Tensor]:
        """The micro-batch of the run that takes the most memory; of a stream one of the first block."""
        train = self.prepared.train
        if isinstance(train, RowStream):
            return self._stream_loader(train).largest_batch()
        assert self._sizes is not None
        samples = [train[index] for index in self._sizes.largest(self._order())]
        return self._collate(packed=isinstance(train, PackedRows))(samples)

    def _stream_loader(self, stream: RowStream) -> StreamLoader:
        rank, world_size = self._rank()
        return StreamLoader(
            stream,
            collate=self._collate(packed=stream.packing),
            units=self._units,
            batch_size=self.config.batch_size,
            micro_batches=self.micro_batches,
            num_batches=self.num_batches,
            rank=rank,
            world_size=world_size,
        )

    def _order(self) -> SeededBatches:
        assert self._rows is not None
        rank, world_size = self._rank()
        return SeededBatches(len(self._rows), self.config.batch_size, self.num_batches, self.seed, rank, world_size)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _collate(self, *, packed: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        return self._make_collate(pad_token_id=self.pad_token_id, max_length=self.config.max_length, packed=packed)


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
