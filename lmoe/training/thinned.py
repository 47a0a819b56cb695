"""A long row of entries of which a bounded number is kept."""

from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Thinned(Generic[Entry]):
    """Every n-th entry from the first on, and the last one; n doubles whenever more than `most` would be kept.

    What is kept follows from the entries alone, not from where a run was interrupted.

    Args:
        most: entries that are kept, at least 3.

    Attributes:
        steps: optimizer step of each kept entry, ascending.
        entries: what is kept, in this order.
    """

    def __init__(self, most: int) -> None:
        assert most >= 3
        self.most, self.stride, self.seen = most, 1, 0
        self.steps: list[int] = []
        self.entries: list[Entry] = []
        self._numbers: list[int] = []

    def add(self, step: int, entry: Entry) -> None:
        """Add the entry of a step, which takes the place of the last one where that is of the same step."""
        if self.steps and self.steps[-1] == step:
            self.entries[-1] = entry
            return
        if self._numbers and self._numbers[-1] % self.stride:
            self._keep(lambda number: number % self.stride == 0)
        self.steps.append(step)
        self.entries.append(entry)
        self._numbers.append(self.seen)
        self.seen += 1
        if len(self.entries) > self.most:
            self.stride *= 2
            last = self._numbers[-1]
            self._keep(lambda number: number % self.stride == 0 or number == last)

    def _keep(self, wanted) -> None:
        places = [place for place, number in enumerate(self._numbers) if wanted(number)]
        self.steps = [self.steps[place] for place in places]
        self.entries = [self.entries[place] for place in places]
        self._numbers = [self._numbers[place] for place in places]

    def state(self) -> dict:
        """All but the entries, in types that load with weights_only."""
        return {"stride": self.stride, "seen": self.seen, "steps": self.steps, "numbers": self._numbers}

    def restore(self, state: dict, entries: list[Entry]) -> None:
        """Take what `state` has returned, and the entries that were kept then."""
        self.stride, self.seen = state["stride"], state["seen"]
        self.steps, self._numbers, self.entries = list(state["steps"]), list(state["numbers"]), list(entries)
