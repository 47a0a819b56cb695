"""A run of either tool in a process of its own, and what is measured of it."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.end_to_end.trl_run import TrlJob
from lmoe.report.curves import read_metrics

ROOT = Path(__file__).resolve().parents[2]
OF_THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_")


@dataclass(slots=True, frozen=True, kw_only=True)
class Setting:
    """What is equal for both tools.

    Args:
        base: as lmoe takes it.
        base_folder: as Transformers takes it.
        precision: of the frozen weights: float32 or bfloat16.
        rows: JSON lines.
        steps, batch_size, max_length, packing: of each run.
    """

    base: str
    base_folder: Path
    precision: str
    rows: Path
    steps: int
    batch_size: int
    max_length: int
    packing: bool


@dataclass(slots=True, frozen=True, kw_only=True)
class Measured:
    """One run.

    Args:
        tokens_per_second: real tokens (no padding) of the steps after the first, over their time.
        step_seconds: mean of the steps after the first.
        first_step_seconds: from the start of the process to the end of its first step.
        seconds: of the whole process.
        peak_mb: largest resident size, in 10^6 bytes.
        loss: mean of the last quarter of the steps: a hint that both learn the same.
    """

    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    seconds: float
    peak_mb: float
    loss: float


def run_lmoe(overrides: Sequence[str], setting: Setting, folder: Path, threads: int) -> Measured:
    """Train with lmoe.

    Args:
        overrides: that choose what is injected.
        folder: empty; gets the run.
    """
    clock = folder / "times.json"
    command = [
        sys.executable,
        "train.py",
        *overrides,
        f"backbone.model_name={setting.base}",
        f"backbone.precision={setting.precision}",
        "trainer.precision=bf16-mixed",
        "data=custom",
        f"data.path={setting.rows}",
        "data.val_rows_per_domain=1",
        f"data.max_length={setting.max_length}",
        f"data.batch_size={setting.batch_size}",
        f"data.packing={str(setting.packing).lower()}",
        f"trainer.max_steps={setting.steps}",
        "trainer.log_every_n_steps=1",
        "trainer.val_every_n_steps=0",
        "logger=none",
        "seed=0",
        f"data.cache_dir={folder / 'cache'}",
        "callbacks_from=benchmarks.end_to_end.step_clock",
        "+callbacks.clock._target_=benchmarks.end_to_end.step_clock.StepClock",
        f"+callbacks.clock.path={clock}",
        f"hydra.run.dir={folder / 'run'}",
    ]
    started, seconds, peak = _run(command, threads, folder / "log")
    times = json.loads(clock.read_text(encoding="utf-8"))
    metrics = read_metrics(folder / "run" / "metrics.csv")
    tokens = [value for _, value in metrics["throughput/tokens"]]
    losses = [value for _, value in metrics["train/loss"]]
    return _measured(times, tokens, losses, started, seconds, peak)


def run_trl(rank: int, setting: Setting, folder: Path, threads: int, packages: Path) -> Measured:
    """Train with TRL and PEFT.

    Args:
        rank: of the LoRA.
        folder: empty; gets the run.
        packages: where TRL can be imported from.
    """
    output, spec = folder / "trl.json", folder / "spec.json"
    job = TrlJob(
        base=str(setting.base_folder),
        precision=setting.precision,
        rows=str(setting.rows),
        rank=rank,
        steps=setting.steps,
        batch_size=setting.batch_size,
        max_length=setting.max_length,
        packing=setting.packing,
        lr=1e-3,
        output=str(output),
    )
    spec.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.end_to_end.trl_run", str(spec)]
    started, seconds, peak = _run(command, threads, folder / "log", str(packages))
    found = json.loads(output.read_text(encoding="utf-8"))
    seen = found["tokens"]
    tokens = [now - before for before, now in zip([0, *seen], seen, strict=False)]
    return _measured(found["times"], tokens, found["losses"], started, seconds, peak)


def _run(command: list[str], threads: int, log: Path, *packages: str) -> tuple[float, float, float]:
    """Run a command to its end.

    Returns:
        When it has begun, its seconds, and its peak in MB.

    Raises:
        RuntimeError: it has failed; with the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THREADS)}
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *packages]),
    }
    with log.open("wb") as file:
        started = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.time() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    return started, seconds, peak_mb(usage)


def peak_mb(usage: resource.struct_rusage) -> float:
    """The largest resident size of a process that has ended, in 10^6 bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _measured(
    times: list[float], tokens: list[float], losses: list[float], started: float, seconds: float, peak: float
) -> Measured:
    assert len(times) == len(tokens) == len(losses), (len(times), len(tokens), len(losses))
    quarter = losses[-max(1, len(losses) // 4) :]
    return Measured(
        tokens_per_second=sum(tokens[1:]) / (times[-1] - times[0]),
        step_seconds=(times[-1] - times[0]) / (len(times) - 1),
        first_step_seconds=times[0] - started,
        seconds=seconds,
        peak_mb=peak,
        loss=sum(quarter) / len(quarter),
    )
