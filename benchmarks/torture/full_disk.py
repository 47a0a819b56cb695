"""A save that does not fit: the run stops with a message, and what was saved before goes on to the same bytes."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.torture.kills import difference, made
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.pieces import micro_overrides
from benchmarks.torture.process import Ended, Way, forked, run
from benchmarks.torture.settings import command_line

CLAIM = "a full disk stops a run with a message, and what was saved before goes on to the same bytes"
RUN = "selection biases"
ROOM = 64 << 20
LEFT = (0, 4_000, 40_000, 100_000, 170_000, 260_000, 400_000)
"""Bytes that are free when the run goes on; a checkpoint has about 160,000."""
KILLED_AT = 2
"""Step after whose checkpoint the run is killed that then meets the full disk."""


def torture(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """A run of six steps is killed after some, its disk filled up but for some bytes, and gone on with."""
    place = made(base / "full_disk")
    arguments = command_line(micro_overrides(base), RUN)
    whole = run(Way(), [*arguments, f"hydra.run.dir='{place / 'whole'}'"], place)
    assert whole.code == 0, whole.text
    assert forked(lambda: killed_at([*arguments, f"hydra.run.dir='{place / 'first'}'"]), place).killed
    for left in LEFT:
        with disk(made(place / f"disk {left}"), outcome) as mounted:
            if mounted is None:
                limited(place, left, outcome)
            else:
                filled(place, mounted, left, outcome)


def killed_at(arguments: list[str]) -> int:
    """Train, and die when a checkpoint is whole."""
    from lmoe.cli.train import main
    from lmoe.training.callbacks.run_checkpoint import RunCheckpoint

    save = RunCheckpoint.save

    def saving(self, trainer, name: str) -> None:
        save(self, trainer, name)
        if name == "last.ckpt" and trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    RunCheckpoint.save = saving
    return main(arguments)


@contextlib.contextmanager
def disk(folder: Path, outcome: Outcome) -> Iterator[Path | None]:
    """A file system of ROOM bytes, or None where none may be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    can = sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0
    outcome.figures["by"] = "tmpfs" if can else "RLIMIT_FSIZE"
    try:
        yield folder if can else None
    finally:
        if can:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def filled(place: Path, mounted: Path, left: int, outcome: Outcome) -> None:
    """Resume a run on a file system with `left` bytes free."""
    folder = Path(shutil.copytree(place / "first", mounted / "run"))
    filler = mounted / "filler"
    room = shutil.disk_usage(mounted).free - left
    filler.write_bytes(b"\0" * max(room, 0))
    judge(place, folder, run(Way(), resumed(folder), place), f"{left} bytes free", outcome, filler.unlink)


def limited(place: Path, left: int, outcome: Outcome) -> None:
    """Resume a run that may write no file longer than `left` bytes."""
    folder = Path(shutil.copytree(place / "first", place / f"limited {left}"))

    def train() -> int:
        from lmoe.cli.train import main

        resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
        return main(resumed(folder))

    judge(place, folder, forked(train, place), f"files of {left} bytes at most", outcome, lambda: None)


def resumed(folder: Path) -> list[str]:
    """The command that goes on, to the end."""
    return [f"resume='{folder}'"]


def judge(place: Path, folder: Path, ended: Ended, case: str, outcome: Outcome, free) -> None:
    """What was written before is as it was; with space again it goes on to the end."""
    before = (place / "first" / "checkpoints" / "last.ckpt").read_bytes()
    known = [file.read_bytes() for file in (folder / "checkpoints").glob("*.ckpt")]
    outcome.count("stopped while saving a checkpoint", int(".ckpt cannot be written" in ended.text))
    free()
    problem = None
    if ended.code == 0:
        outcome.count("had space enough")
    elif ended.code != 1 or "Traceback" in ended.text:
        problem = f"exit code {ended.code}: {ended.text[-600:]}"
    elif not any(os.strerror(number) in ended.text for number in (28, 27)):
        problem = f"the message does not say that the disk is full: {ended.text[-600:]}"
    elif before not in known and not newer(folder):
        problem = "the previous checkpoint is gone"
    if problem is None:
        again = run(Way(), resumed(folder), place)
        problem = f"exit code {again.code}: {again.text[-600:]}" if again.code else difference(folder, place / "whole")
    outcome.judge(case, problem)


def newer(folder: Path) -> bool:
    """Whether the run got further before the disk was full."""
    return any(file.name.startswith(("last", "step")) for file in (folder / "checkpoints").glob("*.ckpt"))
