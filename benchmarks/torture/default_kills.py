"""The same with the default job, shortened."""

from pathlib import Path

from benchmarks.torture.kills import Job, kill_all
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.pieces import DEFAULT_JOB

STEPS = 30
CLAIM = f"killed runs of the default job ({STEPS} steps) end with the bytes of the run that nobody killed"
SHORT = (f"trainer.max_steps={STEPS}", "trainer.val_every_n_steps=10", "checkpoint.every_n_steps=5")


def torture(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """`count` runs, one of five a fresh process."""
    cache = f"data.cache_dir='{base}/default_kills/cache'"
    job = Job(name="default job", arguments=[*DEFAULT_JOB, *SHORT, cache])
    kill_all([job], count, seed, base / "default_kills", outcome)
