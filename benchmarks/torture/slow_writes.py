"""Makes what brings files to the disk slow, so that a kill falls into a write: as a module, `python -m lmoe.cli.train`
with it."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 0.05
"""For each step of a write; a checkpoint has seven."""


def slow_down() -> None:
    """Make torch.save, renames and syncs of this process wait; a file written at once is half there for a while."""
    import torch

    for owner, name in ((torch, "save"), (os, "replace"), (os, "fsync")):
        setattr(owner, name, _after_a_while(getattr(owner, name)))
    Path.write_bytes = _in_halves  # type: ignore[method-assign]


def _after_a_while(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(SECONDS)
        return function(*arguments, **options)

    return slow


def _in_halves(path: Path, data: Any) -> int:
    half = len(data) // 2
    with open(path, "wb", buffering=0) as file:
        file.write(data[:half])
        time.sleep(SECONDS)
        file.write(data[half:])
    return len(data)


if __name__ == "__main__":
    slow_down()
    from lmoe.cli.train import main

    sys.exit(main())
