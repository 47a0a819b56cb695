"""What a run costs another one beside it: `make bench-beside`.

The default job, shortened, runs alone and then twice at the same time on the same cores, with each setting of the
environment in turn, so that a slow minute of the machine falls on all of them. Speed is tokens over the time of the
steps from the second one on, as metrics.csv has it; the time of the start counts only in the seconds of the command.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.flags import RESULTS, positive
from benchmarks.machine import facts
from lmoe.cli.threads import own_cores
from lmoe.report.curves import read_metrics

ROOT = Path(__file__).resolve().parents[1]
JOB = ["injection=mixture_lora", "injection.num_experts=8", "logger=none", "data.val_rows_per_domain=1"]
BEFORE, DEFAULT = "libgomp's own", "lmoe's default"
SETTINGS = {BEFORE: {"GOMP_SPINCOUNT": "300000"}, DEFAULT: {}}
"""Environment by name. libgomp lets a thread that waits spin 300,000 times unless it is told otherwise."""
OF_THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_")
MOST_BESIDE, MOST_ALONE = 2.4, 1.02
"""Times a run's time alone that it may take beside another; and its time alone, of that with libgomp's own waiting."""


@dataclass(slots=True, kw_only=True)
class Samples:
    """One setting, an entry a repeat.

    Args:
        alone: seconds for 1,000 tokens.
        beside: the same of the slower of two runs at the same time.
        command_alone, command_beside: seconds of the whole command.
    """

    environment: dict[str, str]
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    command_alone: list[float] = field(default_factory=list)
    command_beside: list[float] = field(default_factory=list)

    def cost_beside(self) -> float:
        """Median over the repeats of the time beside another run to that alone."""
        return statistics.median(b / a for a, b in zip(self.alone, self.beside, strict=True))

    def cost_alone(self, other: "Samples") -> float:
        """Median over the repeats of the time alone to that of another setting."""
        return statistics.median(a / b for a, b in zip(self.alone, other.alone, strict=True))


def run_together(count: int, environment: dict[str, str], steps: int, cache: Path) -> tuple[float, float]:
    """Start so many runs at once.

    Returns:
        Seconds for 1,000 tokens, and of the command, both of the slowest.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OF_THREADS)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started, processes = time.perf_counter(), []
        for number in range(count):
            run = Path(folder) / str(number)
            command = [sys.executable, "train.py", *JOB, f"trainer.max_steps={steps}", "trainer.val_every_n_steps=0"]
            log = stack.enter_context(open(Path(folder) / f"{number}.log", "w", encoding="utf-8"))
            processes.append(
                subprocess.Popen(
                    [*command, f"data.cache_dir={cache}", f"hydra.run.dir={run}"],
                    cwd=ROOT,
                    env=inherited | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        seconds = []
        for process in processes:
            process.wait()
            seconds.append(time.perf_counter() - started)
        for number, process in enumerate(processes):
            if process.returncode:
                raise SystemExit((Path(folder) / f"{number}.log").read_text(encoding="utf-8"))
        return max(seconds_per_1000_tokens(Path(folder) / str(n)) for n in range(count)), max(seconds)


def seconds_per_1000_tokens(run: Path) -> float:
    """Mean over the steps but the first, which counts the validation before it."""
    speeds = [speed for step, speed in read_metrics(run / "metrics.csv")["throughput/tokens_per_second"] if step > 1]
    return statistics.mean(1000 / speed for speed in speeds)


def measure(settings: dict[str, dict[str, str]], steps: int, repeats: int) -> dict[str, Samples]:
    """Each repeat takes all settings, each one further on: alone, then two at once."""
    found = {name: Samples(environment=environment) for name, environment in settings.items()}
    names = list(settings)
    with tempfile.TemporaryDirectory() as cache:
        run_together(1, {}, 2, Path(cache))  # tokenises the rows
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                samples = found[name]
                for count, times, commands in (
                    (1, samples.alone, samples.command_alone),
                    (2, samples.beside, samples.command_beside),
                ):
                    pace, seconds = run_together(count, settings[name], steps, Path(cache))
                    times.append(pace)
                    commands.append(seconds)
                sys.stdout.write(
                    f"repeat {repeat + 1}/{repeats}  {name}: {samples.alone[-1]:.3f} s alone, "
                    f"{samples.beside[-1]:.3f} s beside\n"
                )
                sys.stdout.flush()
    return found


def as_markdown(found: dict[str, Samples], command: str, machine: dict[str, str | int]) -> str:
    """A page with a row a setting."""
    reference = found[BEFORE]
    lines = ["# Two runs at the same time on the same cores", "", f"`{command}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["Seconds for 1,000 tokens, medians; a ratio is the median over the repeats of the ratio within one. Two"]
    lines += ["runs that share the cores fairly take twice their time alone.", ""]
    lines += [
        "| setting | alone | beside | beside to alone | alone to libgomp's own | command alone | command beside |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, samples in found.items():
        environment = " ".join(f"{key}={value}" for key, value in samples.environment.items())
        cells = (
            f"{name} `{environment}`" if environment else name,
            f"{statistics.median(samples.alone):.3f}",
            f"{statistics.median(samples.beside):.3f}",
            f"{samples.cost_beside():.2f}",
            f"{samples.cost_alone(reference):.3f}",
            f"{statistics.median(samples.command_alone):.1f}",
            f"{statistics.median(samples.command_beside):.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parsed_setting(text: str) -> tuple[str, dict[str, str]]:
    """`passive: OMP_WAIT_POLICY=passive` to a name and an environment.

    Raises:
        ArgumentTypeError: anything else.
    """
    name, separator, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split()]
    if not separator or not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME: VARIABLE=VALUE …")
    return name, {variable: value for variable, _, value in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if both claims are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__)
    parser.add_argument("--steps", type=positive, default=20, help="optimizer steps of each run, at least 2")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds")
    parser.add_argument("--cores", type=positive, default=2, help="cores that all runs share")
    parser.add_argument(
        "--setting", type=parsed_setting, action="append", default=[], metavar="'NAME: VARIABLE=VALUE …'"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    given = parser.parse_args(argv)
    if given.steps < 2:
        parser.error("--steps must be at least 2: the first one is not counted")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    settings = SETTINGS | dict(given.setting)
    machine = facts(torch.device("cpu")) | {"threads": own_cores(), "steps": given.steps, "repeats": given.repeats}
    found = measure(settings, given.steps, given.repeats)
    command = shlex.join(["python", "-m", "benchmarks.beside", *(sys.argv[1:] if argv is None else argv)])
    mine = found[DEFAULT]
    claims = {
        f"beside another run at most {MOST_BESIDE} x alone": (mine.cost_beside(), MOST_BESIDE),
        f"alone at most {MOST_ALONE} x libgomp's own": (mine.cost_alone(found[BEFORE]), MOST_ALONE),
    }
    report = {
        "command": command,
        "machine": machine,
        "claims": {what: {"measured": value, "met": value <= limit} for what, (value, limit) in claims.items()},
        "settings": {name: asdict(samples) for name, samples in found.items()},
    }
    given.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (given.output_dir / "beside.json").write_text(text + "\n", encoding="utf-8")
    page = as_markdown(found, command, machine)
    (given.output_dir / "beside.md").write_text(page, encoding="utf-8")
    sys.stdout.write(f"\n{page}\n")
    for what, (value, limit) in claims.items():
        sys.stdout.write(f"  {'met   ' if value <= limit else 'MISSED'}  {what}: {value:.3f}\n")
    return 0 if all(value <= limit for value, limit in claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
