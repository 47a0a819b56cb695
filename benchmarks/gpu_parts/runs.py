"""Parts 5 and 6: whole runs of `lmoe train` on the tiny base."""

import csv
import hashlib
import shutil
from pathlib import Path

from benchmarks.gpu_parts.part import Findings, Place
from lmoe.cli.train import main
from lmoe.files.resources import resource_dir

ROWS = 40


def same_bytes(place: Place) -> Findings:
    """Two runs of one seed, one that was cut in the middle and resumed, and other precisions."""
    steps = 20 if place.cuda else 2
    found, runs = Findings(), Runs(place, steps)
    runs.train("first")
    runs.train("second")
    cut_back(runs.folder("first"), runs.folder("resumed"), steps // 2)
    runs.resume("resumed")
    adapters = {name: digest(runs.folder(name)) for name in ("first", "second", "resumed")}
    found.expect(adapters["second"] == adapters["first"], "the same seed gave other bytes")
    found.expect(adapters["resumed"] == adapters["first"], f"resumed after step {steps // 2}, it gave other bytes")
    others = {"checkpointing": "trainer.gradient_checkpointing=true", "32-true": "trainer.precision=32-true"}
    if place.cuda:
        others["16-mixed"] = "trainer.precision=16-mixed"
    for name, setting in others.items():
        runs.train(name, setting)
    losses = {name: runs.losses(name) for name in ("first", *others)}
    for name in others:
        off = abs(losses[name][-1] - losses["first"][-1]) / losses["first"][-1]
        found.expect(off < 0.02, f"{name}: the last loss is {losses[name][-1]:.4f}, {losses['first'][-1]:.4f} in bf16")
    found.figures = {"steps": steps, "adapters": adapters, "last loss": {n: v[-1] for n, v in losses.items()}}
    return found


def one_device(place: Place) -> Findings:
    """ddp and fsdp2 with one device lose what one process loses."""
    found, runs = Findings(), Runs(place, 5 if place.cuda else 2, "trainer.precision=32-true")
    for name in ("auto", "ddp", "fsdp2"):
        runs.train(name, f"trainer.strategy={name}")
    losses = {name: runs.losses(name) for name in ("auto", "ddp", "fsdp2")}
    for name in ("ddp", "fsdp2"):
        pairs = zip(losses[name], losses["auto"], strict=True)
        off = max(abs(a - b) / b for a, b in pairs)
        found.expect(off < 1e-4, f"{name}: a loss is off by {off:.1e}")
    found.figures = {"losses": losses}
    return found


class Runs:
    """Runs of one base on the same few rows.

    Args:
        place: where.
        steps: of each.
        common: further settings.
    """

    def __init__(self, place: Place, steps: int, *common: str) -> None:
        self.place = place
        rows = place.folder / "rows.jsonl"
        text = (resource_dir("data/sft") / "train/sql.jsonl").read_text(encoding="utf-8")
        rows.write_text("".join(text.splitlines(keepends=True)[:ROWS]), encoding="utf-8")
        self.settings = [
            "data=custom",
            "moe=top_k",
            f"data.path={rows}",
            f"data.val_path={rows}",
            f"data.cache_dir={place.folder / 'cache'}",
            f"data.max_length={256 if place.cuda else 128}",
            "data.batch_size=4",
            "data.val_rows_per_domain=4",
            f"trainer.accelerator={'gpu' if place.cuda else 'cpu'}",
            f"trainer.max_steps={steps}",
            "trainer.val_every_n_steps=0",
            f"checkpoint.every_n_steps={steps // 2}",
            "trainer.enable_progress_bar=false",
            "logger=none",
            *common,
        ]

    def folder(self, name: str) -> Path:
        """Run directory of a name."""
        return self.place.folder / name

    def train(self, name: str, *settings: str) -> None:
        """Run `lmoe train` to its end in this process.

        Raises:
            RuntimeError: the run failed; what it said is in the output.
        """
        keys = {setting.partition("=")[0] for setting in settings}
        own = [setting for setting in self.settings if setting.partition("=")[0] not in keys]
        self._done(name, [*own, *settings, f"hydra.run.dir={self.folder(name)}"])

    def resume(self, name: str) -> None:
        """Run `lmoe train resume=…` to its end in this process.

        Raises:
            RuntimeError: the run failed.
        """
        self._done(name, [f"resume={self.folder(name)}"])

    def losses(self, name: str) -> list[float]:
        """train/loss of each step."""
        with (self.folder(name) / "metrics.csv").open(encoding="utf-8", newline="") as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]

    def _done(self, name: str, arguments: list[str]) -> None:
        if code := main(arguments):
            raise RuntimeError(f"the run {name} ended with exit code {code}: {' '.join(arguments)}")


def cut_back(source: Path, target: Path, step: int) -> None:
    """The run as a kill after the checkpoint of an optimizer step leaves it."""
    shutil.copytree(source, target)
    (target / "checkpoints" / "last.ckpt").unlink()
    for file in (target / "checkpoints").glob("step-*.ckpt"):
        if int(file.stem[5:]) > step:
            file.unlink()
    shutil.rmtree(target / "adapter")


def digest(run: Path) -> str:
    """Digest of the adapter of a run."""
    return hashlib.sha256((run / "adapter" / "adapter.safetensors").read_bytes()).hexdigest()[:16]
