"""The order of samples as a pure function of seed and position, which is what makes a run resumable."""

from collections.abc import Iterator

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
