"""How well dpo learns to tell right solutions of word problems from wrong ones, beside what needs no training.

`python -m benchmarks.preference_accuracy` trains the tiny base for 100 steps with each of three seeds on the pairs of
the domain math of data/preference/{train,val}/, and measures each run once on those of judge/, whose problems are
others: accuracy beside choosing by length and by the base's log-probability. Each `--train FILE` and `--held-out FILE`
names other pairs.

`--tune NAME` trains a setting with one seed in another way: without a quarter of the training problems, on which it is
measured. Settings are chosen by that alone; the held-out pairs are not read. Arguments behind these are overrides of
the job. Runs lie in outputs/benchmarks/preference_accuracy/ until the next time.
"""

import argparse
import csv
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.flags import positive
from lmoe.config.evaluate import EvaluateSettings
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.results import PreferenceFigures
from lmoe.vocabulary import TaskName

MODULE = "benchmarks.preference_accuracy"
ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "outputs" / "benchmarks" / "preference_accuracy"
BUNDLED = ROOT / "data" / "preference"
TRAIN = (BUNDLED / "train" / "math.jsonl", BUNDLED / "val" / "math.jsonl")
HELD_OUT = (BUNDLED / "judge" / "math.jsonl",)
HELD_BACK = 0.25
"""Share of the training problems that settings are chosen by."""
JOB = (
    "task=dpo",
    "moe=top_k",
    "data=custom",
    "data.max_length=320",
    "data.val_rows_per_domain=0",
    "trainer.max_steps=100",
)
ONCE = ("trainer.val_every_n_steps=0", "task.precompute_reference=true", "logger=none")
"""What makes runs cheaper: they validate before and after only, and the reference is computed once for all of them."""
CHOSEN = "mixture, 16 pairs"
SETTINGS: dict[str, tuple[str, ...]] = {
    "mixture, 16 pairs": ("phase=joint", "optim.lr=1e-3", "data.batch_size=16"),
    "LoRA, 16 pairs": ("injection=dense_lora", "optim.lr=1e-3", "data.batch_size=16"),
}
UNTRAINED = ("longer", "shorter", "base_log_prob", "base_mean_log_prob")
"""Figures of an evaluation that need no training."""
Row = dict[str, str]


def read(files: Iterable[Path]) -> list[Row]:
    """The rows of some files, which say nothing of domains: all are of one kind."""
    lines = [line for file in files for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]


def write(rows: Iterable[Row], file: Path) -> Path:
    """The file, which now holds the rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows that are held back: all of a share of the prompts, those of the lowest SHA-256."""
    prompts = sorted({row["prompt"] for row in rows}, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
    held_back = set(prompts[: int(len(prompts) * share)])
    return (
        [row for row in rows if row["prompt"] not in held_back],
        [row for row in rows if row["prompt"] in held_back],
    )


def train(name: str, train_file: Path, val_file: Path, overrides: Sequence[str]) -> Path:
    """The folder of a run that has been trained."""
    run = RUNS / name
    shutil.rmtree(run, ignore_errors=True)
    paths = (f"data.path={train_file}", f"data.val_path={val_file}", f"hydra.run.dir={run}")
    subprocess.run([sys.executable, "train.py", *JOB, *ONCE, *paths, *overrides], cwd=ROOT, check=True)
    return run


def after(run: Path) -> dict[str, float]:
    """Loss, margin and accuracy of the last validation of a run."""
    found: dict[str, float] = {}
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for name in ("loss", "reward_margin", "reward_accuracy"):
                if value := line.get(f"val/{name}"):
                    found[name] = float(value)
    return found


def tune(names: Sequence[str], rows: Sequence[Row], overrides: Sequence[str]) -> list[str]:
    """A line for each setting, by what it does on prompts that were held back."""
    kept, held_back = split(rows, HELD_BACK)
    files = write(kept, RUNS / "kept.jsonl"), write(held_back, RUNS / "held_back.jsonl")
    lines = [f"| setting | loss of {len(held_back)} pairs held back | margin | accuracy |", "|---|---:|---:|---:|"]
    for name in names:
        found = after(train("tune", *files, [*SETTINGS[name], *overrides]))
        lines.append(
            f"| {name} | {found['loss']:.4f} | {found['reward_margin']:.3f} | {found['reward_accuracy']:.1%} |"
        )
    return lines


def measure(name: str, seeds: int, rows: Sequence[Row], held_out: Sequence[Row], overrides: Sequence[str]) -> list[str]:
    """Lines on a setting's runs, one a seed, and on what needs no training."""
    files = write(rows, RUNS / "train.jsonl"), write(held_out, RUNS / "held_out.jsonl")
    found: list[PreferenceFigures] = []
    for seed in range(seeds):
        run = train(f"seed_{seed}", *files, [*SETTINGS[name], f"seed={seed}", *overrides])
        settings = EvaluateSettings(checkpoint=str(run), data=str(files[1]), task=TaskName.dpo)
        found.append(evaluate(settings, say=lambda line: None).preferences[-1])
    lines = [f"| choosing by | accuracy on {found[0].pairs} held-out pairs | standard error |", "|---|---:|---:|"]
    for seed, one in enumerate(found):
        lines.append(f"| dpo, {name}, seed {seed} | {one.on_accuracy:.1%} | {one.on_accuracy_stderr:.1%} |")
    lines.append(f"| mean of {seeds} seeds | {statistics.fmean(one.on_accuracy for one in found):.1%} | |")
    lines += [f"| {figure} | {getattr(found[0], figure):.1%} | |" for figure in UNTRAINED]
    return lines


def main(given: Sequence[str] | None = None) -> int:
    """Trains, measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--train", type=Path, action="append", metavar="FILE", help="default: the bundled ones")
    parser.add_argument("--held-out", type=Path, action="append", metavar="FILE", help="default: the bundled ones")
    parser.add_argument("--tune", choices=list(SETTINGS), action="append", metavar="NAME", help=f"of {list(SETTINGS)}")
    parser.add_argument("--setting", choices=list(SETTINGS), default=CHOSEN, metavar="NAME", help=f"default: {CHOSEN}")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("overrides", nargs="*", help="of the job, such as trainer.precision=32-true")
    flags = parser.parse_args(given)
    rows = read(flags.train or TRAIN)
    if flags.tune:
        lines = tune(flags.tune, rows, flags.overrides)
    else:
        lines = measure(flags.setting, flags.seeds, rows, read(flags.held_out or HELD_OUT), flags.overrides)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
