"""Losses at the labels beside the logits of all tokens, with a large vocabulary: `make bench-logits`.

One forward and backward of a model with experts, frozen as in training, or with its output layer trained too; losses
and gradients of both ways agree before anything is timed. Memory is resident memory in a process of its own, from
where model and batch stand and a few tokens have gone through, to the peak.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.flags import RESULTS, batch_shape, positive
from benchmarks.machine import facts
from benchmarks.memory import Peak, in_own_process, peak, settle
from benchmarks.models import Size, random_batch, random_model
from benchmarks.step import DTYPES
from benchmarks.timing import Clock, Laps, Timed, interleave, ratio
from lmoe.backbones.label_losses import LabelLosses
from lmoe.cli.threads import own_cores
from lmoe.injection.apply import inject
from lmoe.ops.labels import IGNORE
from lmoe.ops.log_probabilities import token_losses

ALL, OURS = "logits of all tokens", "losses at the labels"
SHARES, HEADS = (50, 100), ("frozen", "trained")
LESS_MEMORY = 3.0
"""Times less memory above the weights that losses at the labels take."""
MOST_TIME = {50: 1.0, 100: 1.10}
"""Times the time of the logits of all tokens that they may take, by the percentage of tokens with a label."""
AGREE = {"fp32": 1e-5, "bf16": 0.05}
"""Largest difference of a gradient, of its largest entry."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Case:
    """What a step is.

    Args:
        share: tokens with a label, in percent.
        head: whether the output layer is frozen or trained.
        dtype: of the frozen weights; with bf16, autocast computes in it.
    """

    share: int
    head: str
    dtype: str

    @property
    def name(self) -> str:
        """Returns its name in a table."""
        return f"{self.dtype}, {self.share} % labels, output layer {self.head}"


class Step:
    """One forward and backward of one of the two ways."""

    def __init__(self, way: str, model: PreTrainedModel, input_ids: Tensor, labels: Tensor, case: Case) -> None:
        self.model, self.input_ids, self.labels, self.case = model, input_ids, labels, case
        self.ours = LabelLosses(model) if way == OURS else None

    def __call__(self) -> Laps:
        """Milliseconds; the gradients stay."""
        self.model.zero_grad(set_to_none=True)
        clock = Clock(self.input_ids.device)
        with torch.autocast(self.input_ids.device.type, dtype=torch.bfloat16, enabled=self.case.dtype == "bf16"):
            losses = self.losses()
        (losses.sum() / (self.labels != IGNORE).sum()).backward()
        clock.mark()
        return clock.laps()

    def losses(self) -> Tensor:
        """(B, T - 1)."""
        if self.ours is not None:
            found = self.ours({"input_ids": self.input_ids}, self.labels)
            assert self.ours.all_logits_because is None, self.ours.all_logits_because
            return found
        return token_losses(self.model(input_ids=self.input_ids, use_cache=False).logits[:, :-1], self.labels)


def build(flags: argparse.Namespace, case: Case) -> Callable[[str, tuple[int, int]], Step]:
    """What makes the steps of a case, around one model."""
    device = torch.device(flags.device)
    heads = max(1, flags.hidden // 32)
    size = Size(
        hidden=flags.hidden,
        ffn=3 * flags.hidden,
        layers=flags.layers,
        heads=heads,
        kv_heads=heads,
        head_dim=32,
        vocab=flags.vocab,
    )
    model = random_model(size, DTYPES[case.dtype], device)
    torch.manual_seed(0)
    inject(model, {"num_experts": 8, "lora_r": 16, "lora_dropout": 0.0, "lora_B_std": 0.01})
    model.train().get_output_embeddings().weight.requires_grad_(case.head == "trained")  # type: ignore[union-attr]

    def step(way: str, shape: tuple[int, int]) -> Step:
        input_ids = random_batch(size, shape, device).input_ids
        labels = input_ids[:, 1:].clone()
        labels[:, : labels.shape[1] * (100 - case.share) // 100] = IGNORE  # a prompt comes before its answer
        return Step(way, model, input_ids, labels, case)

    return step


def disagreement(steps: Sequence[Step]) -> float:
    """The largest difference of a gradient between two ways, of its largest entry.

    Raises:
        AssertionError: they have gradients of other parameters.
    """
    sides = []
    for step in steps:
        step()
        sides.append({name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None})
    one, other = sides
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-30)) for n in one)


def peak_here(flags: argparse.Namespace, way: str, case: Case) -> Peak:
    """Measures two steps in this process, which must be a fresh one."""
    make, device = build(flags, case), torch.device(flags.device)
    make(way, (1, 4))()  # kernels and lazy imports are nobody's
    step = make(way, flags.tokens)
    step.model.zero_grad(set_to_none=True)
    gc.collect()
    base = settle(device)
    for _ in range(2):
        step()
    return Peak(base=base, peak=peak(device))


@dataclass(slots=True, frozen=True, kw_only=True)
class Found:
    """The figures of a case; by way where there are two."""

    case: Case
    timed: dict[str, Timed]
    peaks: dict[str, Peak]
    disagreement: float

    @property
    def time(self) -> float:
        """Returns the ratio of ours to the other."""
        return ratio(self.timed[OURS], self.timed[ALL])

    @property
    def memory(self) -> float:
        """Times less above the weights."""
        return self.peaks[ALL].training / self.peaks[OURS].training

    def claims(self) -> dict[str, tuple[float, bool]]:
        """Figure and whether it is met, by claim."""
        most = MOST_TIME[self.case.share]
        return {
            f"{self.case.name}: at least {LESS_MEMORY:g} x less memory": (self.memory, self.memory >= LESS_MEMORY),
            f"{self.case.name}: at most {most:.2f} x the time": (self.time, self.time <= most),
        }


def measure(flags: argparse.Namespace, case: Case) -> Found:
    """Measures one case."""
    make = build(flags, case)
    steps = {way: make(way, flags.tokens) for way in (ALL, OURS)}
    apart = disagreement(list(steps.values()))
    if apart > AGREE[case.dtype]:
        raise SystemExit(f"{case.name}: gradients differ by {apart:.1e} of their largest entry")
    timed = interleave(
        steps, ("forward+backward",), warmup=1, repeats=flags.repeats, progress=lambda at: say(f"{case.name}: {at}")
    )
    shape = [f"--tokens={flags.tokens[0]}x{flags.tokens[1]}"]
    shape += [f"--{name}={getattr(flags, name)}" for name in ("vocab", "hidden", "layers", "device", "threads")]
    shape += [f"--dtype={case.dtype}", f"--share={case.share}", f"--head={case.head}"]
    peaks = {way: in_own_process("benchmarks.logits", "--memory-of", way, *shape) for way in (ALL, OURS)}
    return Found(case=case, timed=timed, peaks=peaks, disagreement=apart)


def as_json(found: Sequence[Found], command: str, machine: dict[str, str | int]) -> dict:
    """Times in milliseconds, memory in MB (10^6 bytes)."""
    claims = {what: outcome for one in found for what, outcome in one.claims().items()}
    return {
        "command": command,
        "machine": machine,
        "claims": {what: {"measured": value, "met": met} for what, (value, met) in claims.items()},
        "cases": [
            asdict(one.case)
            | {"gradients_differ_by": one.disagreement, "time_ratio": one.time, "memory_ratio": one.memory}
            | {way: {"ms": one.timed[way].of(), "mb": asdict(one.peaks[way])} for way in (ALL, OURS)}
            for one in found
        ],
    }


def as_markdown(found: Sequence[Found], command: str, machine: dict[str, str | int]) -> str:
    """A page with a row a case."""
    lines = ["# Losses at the labels, and logits of all tokens", "", f"`{command}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["Forward and backward, medians; the ratio of times is the median over the repeats of the ratio within"]
    lines += ["one. Memory is resident memory above that of model and batch, at the peak.", ""]
    lines += ["| case | ms, all logits | ms, at labels | time | MB, all logits | MB, at labels | less memory |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for one in found:
        milliseconds = (f"{statistics.median(one.timed[way].of()):.0f}" for way in (ALL, OURS))
        megabytes = (f"{one.peaks[way].training:.0f}" for way in (ALL, OURS))
        cells = (one.case.name, *milliseconds, f"{one.time:.2f} x", *megabytes, f"{one.memory:.1f} x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    """Prints to the terminal, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits", description=__doc__)
    parser.add_argument("--vocab", type=positive, default=151_936)
    parser.add_argument("--hidden", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--tokens", type=batch_shape, default="4x512", metavar="BxT", help="sequences x length")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all of them")
    parser.add_argument("--share", type=int, choices=SHARES, action="append", help="labels in percent; default: all")
    parser.add_argument("--head", choices=HEADS, action="append", help="output layer; default: all of them")
    parser.add_argument("--repeats", type=positive, default=5, help="counted rounds")
    parser.add_argument("--threads", type=positive, default=own_cores(), help="of torch; default: every core")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--memory-of", choices=[ALL, OURS], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every claim is met."""
    flags = arguments(argv)
    torch.set_num_threads(flags.threads)
    cases = [
        Case(share=share, head=head, dtype=dtype)
        for dtype in flags.dtype or DTYPES
        for head in flags.head or HEADS
        for share in flags.share or SHARES
    ]
    if flags.memory_of:
        sys.stdout.write(json.dumps(asdict(peak_here(flags, flags.memory_of, cases[0]))) + "\n")
        return 0
    shape = {"vocabulary": flags.vocab, "hidden": flags.hidden, "layers": flags.layers}
    machine = facts(torch.device(flags.device)) | shape | {"B x T": "x".join(map(str, flags.tokens))}
    machine |= {"repeats": flags.repeats, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set")}
    command = shlex.join(["python", "-m", "benchmarks.logits", *(sys.argv[1:] if argv is None else argv)])
    found = [measure(flags, case) for case in cases]
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(found, command, machine), indent=1, ensure_ascii=False)
    (flags.output_dir / "logits.json").write_text(text + "\n", encoding="utf-8")
    page = as_markdown(found, command, machine)
    (flags.output_dir / "logits.md").write_text(page, encoding="utf-8")
    say(f"\n{page}")
    claims = {what: outcome for one in found for what, outcome in one.claims().items()}
    for what, (value, met) in claims.items():
        say(f"  {'met   ' if met else 'MISSED'}  {what}: {value:.2f}")
    return 0 if all(met for _, met in claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
