"""The order of samples as a pure function of seed and position, which is what makes a run resumable."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


class SeededBatches(Sampler[list[int]]):
    """Batches of one long epoch: sample p of the run is permutation[p // size][p % size].

    Micro-batch g of the run (counted over all ranks) holds samples g * batch_size to (g + 1) * batch_size - 1, and
    rank r of W takes g = r, r + W, ...: so W ranks see in one step what one process sees in W accumulated
    micro-batches.

    Args:
        size: samples in the data set.
        batch_size: samples in one micro-batch.
        num_batches: micro-batches of this rank in the whole run.
        seed: seed of every permutation.
        rank, world_size: this process among all.
    """

    def __init__(
        self, size: int, batch_size: int, num_batches: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.batch_size, self.num_batches = size, batch_size, num_batches
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start = 0
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.num_batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [self.index(position) for position in range(first, first + self.batch_size)]

    def index(self, position: int) -> int:
        """Index in the data set of sample `position` of the run."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator)
        return int(self._permutation[offset])


class ResumableLoader(DataLoader):
    """A DataLoader over SeededBatches whose state is the number of micro-batches yielded."""

    def __init__(self, dataset, batches: SeededBatches, **options) -> None:
        super().__init__(dataset, batch_sampler=batches, **options)
        self._batches = batches
        self._yielded = 0

    def __iter__(self):
        self._yielded = self._batches.start
        for batch in super().__iter__():
            self._yielded += 1
            yield batch
        self._batches.start = 0

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batches.start = self._yielded = state["yielded"]

    def start_at(self, batch: int) -> None:
        """Let the next iteration begin with micro-batch `batch` of the run."""
        self._batches.start = batch


class SwitchingLoader:
    """The micro-batches of several loaders, of which one is asked for each; its state is their number, as of one.

    Micro-batch g of the run is micro-batch g of the loader that is asked for it: what a loader would give in the steps
    of another one is passed over, so that nothing depends on when another one's turn came.

    Args:
        loaders: of the whole run, each.
        number_of: which of them micro-batch g of this rank is taken from; asked when its turn comes.
    """

    def __init__(self, loaders: Sequence[ResumableLoader], number_of: Callable[[int], int]) -> None:
        self._loaders, self._number_of = loaders, number_of
        self._yielded = 0

    def __len__(self) -> int:
        return len(self._loaders[0])

    def __iter__(self) -> Iterator[Any]:
        current, batches = None, iter(())
        while self._yielded < len(self):
            number = self._number_of(self._yielded)
            if number != current:
                self._loaders[number].start_at(self._yielded)
                current, batches = number, iter(self._loaders[number])
            self._yielded += 1
            yield next(batches)
        self._yielded = 0

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._yielded = state["yielded"]
