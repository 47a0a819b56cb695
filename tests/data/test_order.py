"""The order of samples: pure, resumable, the same for any number of ranks and workers."""

import pytest
import torch
from torch.utils.data import Dataset

from lmoe.data.order import ResumableLoader, SeededBatches


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def batches(count: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> SeededBatches:
    return SeededBatches(10, 3, count, seed, rank, world_size)


def loader(count: int, num_workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Numbers(), batches(count), num_workers=num_workers, persistent_workers=num_workers > 0)


def as_lists(found: list[torch.Tensor]) -> list[list[int]]:
    return [batch.tolist() for batch in found]


def test_every_epoch_holds_every_sample_once_in_another_order() -> None:
    samples = [index for batch in batches(10) for index in batch]
    epochs = [samples[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(batches(10)) == list(batches(10)) != list(batches(10, seed=1))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_see_in_one_step_what_one_process_sees_accumulated(world_size: int) -> None:
    alone = list(batches(12))
    ranks = [list(batches(12 // world_size, rank, world_size)) for rank in range(world_size)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == alone


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 10, 11])
def test_a_loader_resumed_yields_exactly_the_rest(stop: int, num_workers: int) -> None:
    whole = as_lists(list(loader(11)))
    first = loader(11, num_workers)
    iterator = iter(first)
    begun = as_lists([next(iterator) for _ in range(stop)])
    state = first.state_dict()
    assert state == {"yielded": stop}
    resumed = loader(11, num_workers)
    resumed.load_state_dict(state)
    assert begun + as_lists(list(resumed)) == whole
    assert resumed.state_dict() == {"yielded": 11}


def test_a_loader_begins_anew_after_its_end() -> None:
    used = loader(5)
    used.load_state_dict({"yielded": 3})
    assert len(list(used)) == 2
    assert as_lists(list(used)) == as_lists(list(loader(5)))


def test_a_data_set_smaller_than_a_batch_is_repeated() -> None:
    [batch] = SeededBatches(2, 5, 1, 0)
    assert sorted(batch[:2]) == sorted(batch[2:4]) == [0, 1]
