"""Folders as runs have them while they train and when they have ended."""

import shutil
from pathlib import Path

from lmoe.report.routing_file import write_routing
from tests.report.routing import made_up


def under_way(finished: Path, folder: Path, *, steps: int = 3) -> Path:
    """The folder of a run that has made some steps: no report but routing.npz, and so many rows of metrics.csv."""
    run = Path(shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("report", "adapter", "checkpoints")))
    cut_metrics(finished, run, steps)
    write_routing(made_up(steps=2, every=1, validations=1, domains=("code", "math", "words")), run / "report")
    return run


def cut_metrics(finished: Path, run: Path, steps: int) -> None:
    """Write the rows of the first steps alone."""
    lines = (finished / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines[1:] if int(line.partition(",")[0]) <= steps]
    (run / "metrics.csv").write_text("".join([lines[0], *kept]), encoding="utf-8")
