"""What a part is given and what it leaves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(slots=True, frozen=True, kw_only=True)
class Place:
    """Where a part runs.

    Args:
        device: a GPU, or the CPU, where sizes are tiny and nothing is timed for its figures.
        folder: for files, empty.
    """

    device: torch.device
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def settled(self) -> None:
        """Wait until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()


@dataclass(slots=True)
class Findings:
    """What a part found; without problems it has passed.

    Args:
        figures: by name: numbers, words, or a table as a list of rows.
        problems: each in one line.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem where a claim does not hold."""
        if not holds:
            self.problems.append(problem)
