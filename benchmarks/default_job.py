"""Time, memory and losses of the default job: `make bench-default`.

Runs `python train.py injection=mixture_lora injection.num_experts=8` in a process of its own, as a user would, and
prints what the job promises beside what was measured. Arguments are passed on as overrides.
"""

import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lmoe.cli.threads import own_cores

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "outputs" / "benchmarks" / "default_job"
RESULT = ROOT / "benchmarks" / "results" / "default_job.json"
DEFAULT = ["injection=mixture_lora", "injection.num_experts=8"]
MOST_SECONDS, MOST_MB, DEAD_SHARE = 180.0, 2000.0, 0.01


@dataclass(slots=True, kw_only=True)
class Result:
    """One run of the default job.

    Args:
        seconds: wall clock of the whole process.
        peak_memory_mb: largest resident size of the process, in 10^6 bytes.
        before, after: validation loss by domain in nats per label token.
        dead: experts below a hundredth of a uniform load, over all sites.
    """

    command: str
    machine: str
    seconds: float
    peak_memory_mb: float
    before: dict[str, float]
    after: dict[str, float]
    dead: int

    def claims(self) -> list[tuple[str, str, bool]]:
        """The claims about the job, each as (what, measured, met)."""
        fallen = [d for d in self.after if self.after[d] < self.before[d]]
        mean_before = sum(self.before.values()) / len(self.before)
        mean_after = sum(self.after.values()) / len(self.after)
        return [
            (f"at most {MOST_SECONDS:.0f} s", f"{self.seconds:.0f} s", self.seconds <= MOST_SECONDS),
            (f"peak below {MOST_MB:.0f} MB", f"{self.peak_memory_mb:.0f} MB", self.peak_memory_mb < MOST_MB),
            ("loss falls in every domain", f"{len(fallen)} of {len(self.after)}", len(fallen) == len(self.after)),
            ("no dead expert", f"{self.dead} dead", self.dead == 0),
            ("mean validation loss", f"{mean_before:.3f} -> {mean_after:.3f}", mean_after < mean_before),
        ]


def measure(overrides: list[str]) -> Result:
    """Run the job; its run directory is kept under outputs/ until the next time."""
    shutil.rmtree(RUN, ignore_errors=True)
    command = [sys.executable, "train.py", *DEFAULT, *overrides]
    started = time.perf_counter()
    subprocess.run([*command, f"hydra.run.dir={RUN.relative_to(ROOT)}"], cwd=ROOT, check=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    summary = json.loads((RUN / "report" / "summary.json").read_text(encoding="utf-8"))
    loads = summary["site_load"].values()
    return Result(
        command=" ".join(["python", *command[1:]]),
        machine=f"{platform.machine()}, {own_cores()} cores, torch {torch.__version__}",
        seconds=seconds,
        peak_memory_mb=peak,
        before=summary["before"],
        after=summary["after"],
        dead=sum(share < DEAD_SHARE / len(load) for load in loads for share in load),
    )


def main() -> int:
    """Returns 0 if every claim is met."""
    result = measure(sys.argv[1:])
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"\n{result.command}\n{result.machine}\n")
    for what, measured, met in result.claims():
        sys.stdout.write(f"  {'met   ' if met else 'MISSED'}  {what}: {measured}\n")
    return 0 if all(met for _, _, met in result.claims()) else 1


if __name__ == "__main__":
    sys.exit(main())
