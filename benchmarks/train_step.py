"""Training steps of frozen base, PEFT, eulerforge and lmoe side by side: `make bench-step`.

All contestants of a group live in one process around the same frozen weights, and take turns. Peers that are not
installed are left out with a note; `pip install --no-deps eulerforge==0.1.0` brings the one that lmoe does not need.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from benchmarks import machine, memory
from benchmarks.contestants import Contestant, step_groups
from benchmarks.entrants import chosen, ready
from benchmarks.flags import shared_flags
from benchmarks.memory import Peak
from benchmarks.models import SIZES, Batch, random_batch, random_model, sharing_copy
from benchmarks.results import Report, Row, Skip
from benchmarks.runs import Say, run_types
from benchmarks.step import DTYPES, PARTS, TrainStep
from benchmarks.targets import STEP_TARGETS, judge
from benchmarks.timing import interleave


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command, checked."""
    parser = shared_flags(__doc__, "benchmarks.train_step", repeats=10, tokens="4x256")
    parser.add_argument("--size", choices=SIZES, default="45m", help="0.6b and 4b need a GPU")
    parser.add_argument(
        "--group",
        choices=["all", *step_groups()],
        action="append",
        help="may be repeated; default: grid, which has what the targets need; all takes some hours on a CPU",
    )
    parser.add_argument("--no-memory", action="store_true", help="time only")
    flags = parser.parse_args(given)
    flags.group = flags.group or ["grid"]
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if SIZES[flags.size].needs_accelerator and flags.device == "cpu":
        parser.error(f"--size {flags.size} needs a GPU; on a CPU take 45m or micro")
    return flags


def measure(flags: argparse.Namespace, dtype: str, say: Say) -> Report:
    """Every group in one type."""
    device, size = torch.device(flags.device), SIZES[flags.size]
    torch.set_num_threads(flags.threads)
    base = random_model(size, DTYPES[dtype], device)
    batch = random_batch(size, flags.tokens, device)
    rows: list[Row] = []
    skipped: list[Skip] = []
    for name, group in step_groups().items():
        entrants = chosen(group, flags.only) if {name, "all"} & {*flags.group} else []
        if entrants:
            say(f"{dtype} {name}: {len(entrants)} contestants")
            timed, notes = time_group(name, entrants, base, batch, flags, dtype, lambda text: say(f"  {text}"))
            rows, skipped = rows + timed, skipped + notes
            gc.collect()
    peaks: dict[str, Peak] = {}
    if not flags.no_memory:
        peaks, notes = measure_memory(rows, flags, dtype, say)
        skipped += notes
    grid = {row.name: row.timed for row in rows if row.group == "grid"}
    return Report(
        title=f"Training step, {flags.size}, {dtype}, {flags.device}",
        command=command(flags, dtype),
        machine=machine.facts(device),
        work={
            "size": flags.size,
            "parameters": sum(parameter.numel() for parameter in base.parameters()),
            "dtype": dtype,
            "sequences": flags.tokens[0],
            "length": flags.tokens[1],
            "warmup": flags.warmup,
            "repeats": flags.repeats,
        },
        parts=PARTS,
        rows=[replace(row, peak=peaks.get(row.name)) for row in rows],
        skipped=list(dict.fromkeys(skipped)),
        targets=judge(STEP_TARGETS, grid, peaks),
    )


def time_group(
    name: str,
    entrants: Sequence[Contestant],
    base: PreTrainedModel,
    batch: Batch,
    flags: argparse.Namespace,
    dtype: str,
    say: Say,
) -> tuple[list[Row], list[Skip]]:
    """Interleaved steps of contestants that are alive together."""

    def build(contestant: Contestant) -> TrainStep:
        return TrainStep(contestant.load().attach(sharing_copy(base), contestant.experts), batch, DTYPES[dtype])

    steps, skipped = ready(entrants, build)
    by_name = {contestant.name: step for contestant, step in steps.items()}
    timed = interleave(by_name, PARTS, warmup=flags.warmup, repeats=flags.repeats, progress=say)
    rows = [
        Row(
            group=name,
            name=contestant.name,
            timed=timed[contestant.name],
            reference_name=contestant.reference,
            reference=timed.get(contestant.reference),
            trained=sum(parameter.numel() for parameter in step.trainee.trained()),
        )
        for contestant, step in steps.items()
    ]
    return rows, skipped


def measure_memory(
    rows: Sequence[Row], flags: argparse.Namespace, dtype: str, say: Say
) -> tuple[dict[str, Peak], list[Skip]]:
    """Peaks by name of whatever was timed."""
    known = {contestant.name: contestant for group in step_groups().values() for contestant in group}
    peaks: dict[str, Peak] = {}
    skipped: list[Skip] = []
    for name in dict.fromkeys(row.name for row in rows):
        say(f"{dtype} memory: {name}")
        try:
            peaks[name] = memory.measure(
                known[name],
                size=flags.size,
                dtype=dtype,
                tokens=flags.tokens,
                device=flags.device,
                threads=flags.threads,
            )
        except RuntimeError as error:
            skipped.append(Skip(name=name, why=f"memory was not measured: {error}"))
    return peaks, skipped


def command(flags: argparse.Namespace, dtype: str) -> str:
    """What to type for the same again."""
    words = ["python -m benchmarks.train_step", f"--size {flags.size}", f"--dtype {dtype}"]
    words += [f"--tokens {flags.tokens[0]}x{flags.tokens[1]}", f"--repeats {flags.repeats}"]
    words += [f'--group "{name}"' for name in flags.group] + [f'--only "{name}"' for name in flags.only or ()]
    return " ".join([*words, *(["--no-memory"] if flags.no_memory else [])])


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0 if no target is missed."""
    flags = arguments(given)
    return run_types(flags, measure, lambda dtype: f"train_step_{flags.device}_{flags.size}_{dtype}")


if __name__ == "__main__":
    sys.exit(main())
