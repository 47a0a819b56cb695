"""LoRA on the experts of a Qwen3-MoE, beside PEFT's target_parameters: `make bench-native`.

Both train LoRA of the same rank on both fused tensors of every layer, and nothing else. Before anything is timed they
get the same weights, and loss and gradients have to agree in float32. A second group has twice the experts at half the
rank: as many adapter parameters around frozen weights of twice the size.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks import machine, memory
from benchmarks.agreement import differences, fill, gradient, in_words, stacked, values
from benchmarks.contestants import Contestant, native_contestants
from benchmarks.entrants import chosen, ready
from benchmarks.experts import Experts
from benchmarks.flags import positive, shared_flags
from benchmarks.memory import Peak
from benchmarks.models import NATIVE_SIZES, Size, random_batch, random_model, sharing_copy
from benchmarks.results import Report, Row, Skip
from benchmarks.runs import Say, run_types
from benchmarks.step import DTYPES, PARTS, TrainStep
from benchmarks.targets import judge, native_targets
from benchmarks.timing import Timed, interleave

SHAPE = ("hidden", "ffn", "layers", "experts", "top_k")
"""Fields of a size that have a flag."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked; `flags.shape` is the size with what the flags change."""
    parser = shared_flags(__doc__, "benchmarks.native_experts", repeats=7, tokens="4x128")
    parser.add_argument("--size", choices=NATIVE_SIZES, default="54m")
    for field in SHAPE:
        parser.add_argument(f"--{field.replace('_', '-')}", type=positive, help="default: that of the size")
    parser.add_argument("--rank", type=positive, default=16, help="even; the second group has half of it")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    flags = parser.parse_args(given)
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    changed = {field: value for field in SHAPE if (value := getattr(flags, field))}
    flags.shape = replace(NATIVE_SIZES[flags.size], **changed)
    if flags.rank % 2:
        parser.error(f"--rank {flags.rank} is odd, and the second group has half the rank")
    if flags.shape.top_k > flags.shape.experts:
        parser.error(f"{flags.shape.top_k} chosen of {flags.shape.experts} experts: at most all of them can be chosen")
    return flags


@dataclass(slots=True, frozen=True, kw_only=True)
class Group:
    """Contestants around one model.

    Args:
        name: of the group.
        size: shape of the model.
        experts: its experts and the rank of LoRA on them.
        entrants: who takes part.
    """

    name: str
    size: Size
    experts: Experts
    entrants: list[Contestant]


def groups(flags: argparse.Namespace) -> list[Group]:
    """The size as it is, and with twice the experts at half the rank."""
    found = []
    for factor in (1, 2):
        size = replace(flags.shape, experts=factor * flags.shape.experts)
        experts = Experts(size.experts, flags.rank // factor, size.top_k)
        name = f"{size.experts} experts, rank {experts.rank}"
        entrants = chosen(native_contestants(experts), flags.only)
        found.append(Group(name=name, size=size, experts=experts, entrants=entrants))
    return found


class Bench:
    """One model and its batch; contestants share their tensors."""

    def __init__(self, size: Size, dtype: torch.dtype, flags: argparse.Namespace) -> None:
        device = torch.device(flags.device)
        self.dtype, self.model = dtype, random_model(size, dtype, device)
        self.batch = random_batch(size, flags.tokens, device)

    def build(self, contestant: Contestant) -> TrainStep:
        """A contestant with the weights that all have, around a copy that shares the frozen ones."""
        peer = contestant.load()
        trainee = peer.attach(sharing_copy(self.model), contestant.experts)
        fill(peer.factors(trainee.model, values))
        return TrainStep(trainee, self.batch, self.dtype)

    def outcome(self, contestant: Contestant) -> dict[str, Tensor]:
        """Loss and gradients before any step."""
        trainee = self.build(contestant).trainee
        loss = trainee.loss(self.batch)
        loss.backward()
        return {"loss": loss.detach(), **stacked(contestant.load().factors(trainee.model, gradient))}


def agreement(group: Group, flags: argparse.Namespace) -> dict[str, float]:
    """How far loss and gradients are from the first contestant's, in float32; see `differences`."""
    bench = Bench(group.size, torch.float32, flags)
    runs, _ = ready([contestant for contestant in group.entrants if contestant.peer != "frozen"], bench.build)
    return differences({contestant.name: bench.outcome(contestant) for contestant in runs})


def time_group(group: Group, flags: argparse.Namespace, dtype: str, say: Say) -> tuple[list[Row], list[Skip]]:
    """Interleaved steps of contestants that are alive together."""
    steps, skipped = ready(group.entrants, Bench(group.size, DTYPES[dtype], flags).build)
    by_name = {contestant.name: step for contestant, step in steps.items()}
    timed = interleave(by_name, PARTS, warmup=flags.warmup, repeats=flags.repeats, progress=lambda t: say(f"  {t}"))
    rows = [
        Row(
            group=group.name,
            name=contestant.name,
            timed=timed[contestant.name],
            reference_name=contestant.reference,
            reference=timed.get(contestant.reference),
            trained=sum(parameter.numel() for parameter in step.trainee.trained()),
        )
        for contestant, step in steps.items()
    ]
    return rows, skipped


def measure(flags: argparse.Namespace, dtype: str, say: Say) -> Report:
    """Both groups in one type."""
    torch.set_num_threads(flags.threads)
    rows: list[Row] = []
    skipped: list[Skip] = []
    agreed: dict[str, str | int] = {}
    both = groups(flags)
    for group in both:
        agreed[f"agreement of {group.name}"] = in_words(agreement(group, flags))
        say(f"{dtype} {group.name}: {agreed[f'agreement of {group.name}']}")
        timed, notes = time_group(group, flags, dtype, say)
        rows, skipped = rows + timed, skipped + notes
        gc.collect()
    peaks: dict[str, Peak] = {}
    for name in [] if flags.no_memory else [row.name for row in rows]:
        say(f"{dtype} memory: {name}")
        try:
            peaks[name] = memory.in_own_process("benchmarks.native_experts", *words(flags, dtype), "--memory-of", name)
        except RuntimeError as error:
            skipped.append(Skip(name=name, why=f"memory was not measured: {error}"))
    times: dict[str, Timed] = {row.name: row.timed for row in rows}
    return Report(
        title=f"LoRA on native experts, training step, {flags.size}, {dtype}, {flags.device}",
        command=command(flags, dtype),
        machine=machine.facts(torch.device(flags.device)),
        work={
            **{name: value for name, value in asdict(flags.shape).items() if name != "needs_accelerator"},
            "dtype": dtype,
            "sequences": flags.tokens[0],
            "length": flags.tokens[1],
            "warmup": flags.warmup,
            "repeats": flags.repeats,
            **agreed,
        },
        parts=PARTS,
        rows=[replace(row, peak=peaks.get(row.name)) for row in rows],
        skipped=list(dict.fromkeys(skipped)),
        targets=judge(native_targets(*(group.experts for group in both)), times, peaks),
        reference="the frozen model",
    )


def words(flags: argparse.Namespace, dtype: str) -> list[str]:
    """The flags that a process of its own needs."""
    shape = [word for field in SHAPE for word in (f"--{field.replace('_', '-')}", str(getattr(flags.shape, field)))]
    tokens, threads = f"{flags.tokens[0]}x{flags.tokens[1]}", str(flags.threads)
    own = ["--size", flags.size, *shape, "--rank", str(flags.rank), "--dtype", dtype]
    return [*own, "--tokens", tokens, "--device", flags.device, "--threads", threads]


def command(flags: argparse.Namespace, dtype: str) -> str:
    """What to type for the same again."""
    chosen_only = [f'--only "{name}"' for name in flags.only or ()]
    own = words(flags, dtype)[: -len(["--device", "", "--threads", ""])]
    parts = ["python -m benchmarks.native_experts", *own, f"--repeats {flags.repeats}", *chosen_only]
    return " ".join([*parts, *(["--no-memory"] if flags.no_memory else [])])


def print_peak(flags: argparse.Namespace) -> None:
    """The memory of one contestant, in this process, which must be a fresh one."""
    torch.set_num_threads(flags.threads)
    group, contestant = next((g, c) for g in groups(flags) for c in g.entrants if c.name == flags.memory_of)
    dtype = DTYPES[flags.dtype[0]]
    bench, peer = Bench(group.size, dtype, flags), contestant.load()

    def build() -> TrainStep:
        return TrainStep(peer.attach(bench.model, contestant.experts), bench.batch, dtype)

    sys.stdout.write(json.dumps(asdict(memory.peak_of(build, bench.model, bench.batch))) + "\n")


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0 if no target is missed."""
    flags = arguments(given)
    if flags.memory_of:
        print_peak(flags)
        return 0
    return run_types(flags, measure, lambda dtype: f"native_experts_{flags.device}_{flags.size}_{dtype}")


if __name__ == "__main__":
    sys.exit(main())
