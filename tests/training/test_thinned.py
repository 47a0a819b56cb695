"""Of a long row a bounded number of entries is kept, evenly, with the first and the last."""

import pytest

from lmoe.training.thinned import Thinned


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 100, 1000, 12345])
def test_the_first_and_the_last_stay_and_the_others_are_one_stride_apart(count: int) -> None:
    kept: Thinned[str] = Thinned(8)
    for number in range(count):
        kept.add(10 * number, f"entry {number}")
        assert len(kept.entries) == len(kept.steps) <= 8
        assert kept.steps[0] == 0 and kept.steps[-1] == 10 * number
    assert kept.entries == [f"entry {step // 10}" for step in kept.steps]
    gaps = {b - a for a, b in zip(kept.steps[:-1], kept.steps[1:-1], strict=False)}
    assert len(gaps) <= 1 and len(kept.steps) > min(count, 8) // 2


@pytest.mark.parametrize("stop", [1, 5, 8, 9, 13, 17, 40])
def test_what_is_kept_does_not_depend_on_where_it_was_interrupted(stop: int) -> None:
    whole: Thinned[int] = Thinned(8)
    first: Thinned[int] = Thinned(8)
    for number in range(50):
        whole.add(number, number)
    for number in range(stop):
        first.add(number, number)
    later: Thinned[int] = Thinned(8)
    later.restore(first.state(), first.entries)
    for number in range(stop, 50):
        later.add(number, number)
    assert later.steps == whole.steps and later.entries == whole.entries and later.state() == whole.state()


def test_the_same_step_again_takes_the_place_of_the_last_entry() -> None:
    kept: Thinned[str] = Thinned(3)
    for step, entry in ((1, "a"), (2, "b"), (2, "c")):
        kept.add(step, entry)
    assert kept.entries == ["a", "c"] and kept.seen == 2
