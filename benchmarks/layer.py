"""Forward and backward of one FFN Linear with each kind of adapter: `make bench-layer`."""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.contestants import Contestant, layer_contestants
from benchmarks.entrants import chosen, ready
from benchmarks.flags import positive, shared_flags
from benchmarks.results import Report, Row
from benchmarks.runs import Say, run_types
from benchmarks.step import DTYPES
from benchmarks.targets import LAYER_TARGETS, judge
from benchmarks.timing import Clock, Laps, interleave

PARTS = ("forward", "backward")


class LayerRun:
    """Forward and backward of one layer, some times over; the input needs a gradient, as inside a model."""

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor, times: int) -> None:
        self.layer, self.x, self.grad, self.times = layer, x, grad, times

    def __call__(self) -> Laps:
        """Mean milliseconds of the parts."""
        runs = [self._once() for _ in range(self.times)]
        return tuple(sum(laps) / self.times for laps in zip(*runs, strict=True))

    def _once(self) -> Laps:
        for tensor in chain([self.x], self.layer.parameters()):
            tensor.grad = None
        clock = Clock(self.x.device)
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16, enabled=self.x.dtype is torch.bfloat16):
            y = self.layer(self.x)
        clock.mark()
        y.backward(self.grad)
        clock.mark()
        return clock.laps()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command, checked."""
    parser = shared_flags(__doc__, "benchmarks.layer", repeats=20, tokens="8x256")
    parser.add_argument("--features", type=positive, nargs=2, default=[1024, 3072], metavar=("IN", "OUT"))
    parser.add_argument("--times", type=positive, default=5, help="runs of which a sample is the mean")
    flags = parser.parse_args(given)
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return flags


def measure(flags: argparse.Namespace, dtype: str, say: Say) -> Report:
    """All contestants in one type."""
    device, (wide_in, wide_out) = torch.device(flags.device), flags.features
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    x = torch.randn(*flags.tokens, wide_in).to(device, DTYPES[dtype]).requires_grad_()
    grad = torch.randn(*flags.tokens, wide_out).to(device, DTYPES[dtype])
    weight = nn.Linear(wide_in, wide_out, bias=False).to(device, DTYPES[dtype]).requires_grad_(False).weight

    def build(contestant: Contestant) -> LayerRun:
        linear = nn.Linear(wide_in, wide_out, bias=False, device="meta")
        linear.weight = weight
        return LayerRun(contestant.load().wrap(linear, contestant.experts).train(), x, grad, flags.times)

    say(dtype)
    runs, skipped = ready(chosen(layer_contestants(), flags.only), build)
    by_name = {contestant.name: run for contestant, run in runs.items()}
    timed = interleave(by_name, PARTS, warmup=flags.warmup, repeats=flags.repeats, progress=lambda t: say(f"  {t}"))
    return Report(
        title=f"One layer {wide_in} -> {wide_out}, {dtype}, {flags.device}",
        command=command(flags, dtype),
        machine=machine.facts(device),
        work={
            "dtype": dtype,
            "tokens": flags.tokens[0] * flags.tokens[1],
            "warmup": flags.warmup,
            "repeats": flags.repeats,
            "times": flags.times,
        },
        parts=PARTS,
        rows=[
            Row(
                group="layer",
                name=contestant.name,
                timed=timed[contestant.name],
                reference_name=contestant.reference,
                reference=timed.get(contestant.reference),
                trained=sum(p.numel() for p in run.layer.parameters() if p.requires_grad),
            )
            for contestant, run in runs.items()
        ],
        skipped=skipped,
        targets=judge(LAYER_TARGETS, timed, {}),
    )


def command(flags: argparse.Namespace, dtype: str) -> str:
    """What to type for the same again."""
    words = [f"python -m benchmarks.layer --dtype {dtype} --features {flags.features[0]} {flags.features[1]}"]
    words += [f"--tokens {flags.tokens[0]}x{flags.tokens[1]} --repeats {flags.repeats} --times {flags.times}"]
    return " ".join([*words, *(f'--only "{name}"' for name in flags.only or ())])


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0 if no target is missed."""
    flags = arguments(given)
    return run_types(flags, measure, lambda dtype: f"layer_{flags.device}_{dtype}")


if __name__ == "__main__":
    sys.exit(main())
