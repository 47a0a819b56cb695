"""One FFN turned into experts, forward and backward, beside MixLoRA and eulerforge: `make bench-experts`.

Before anything is timed, every package gets the same weights, and outputs and gradients have to agree in float32.
Packages that are not installed are left out with a note: `pip install --no-deps --target FOLDER mixlora==0.2.3
eulerforge==0.1.0`, then put FOLDER on PYTHONPATH.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from benchmarks import machine
from benchmarks.agreement import differences, fill, gradient, in_words, stacked, values
from benchmarks.contestants import PRIMARY, Contestant, expert_ffn_contestants
from benchmarks.entrants import chosen, ready
from benchmarks.experts import Experts
from benchmarks.flags import positive, shared_flags
from benchmarks.layer import PARTS, LayerRun
from benchmarks.results import Report, Row, Skip
from benchmarks.runs import Say, run_types
from benchmarks.step import DTYPES
from benchmarks.targets import Judged, expert_ffn_targets, judge
from benchmarks.timing import interleave

SHAPES = [[1024, 3072], [640, 1920]]
"""Hidden and inner width of Qwen3-0.6B, and of the model of `make bench-step`."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command, checked."""
    parser = shared_flags(__doc__, "benchmarks.expert_ffn", repeats=10, tokens="4x256")
    parser.add_argument(
        "--features",
        type=positive,
        nargs=2,
        action="append",
        metavar=("HIDDEN", "INNER"),
        help="may be repeated; default: 1024 3072 and 640 1920",
    )
    parser.add_argument("--experts", type=positive, default=PRIMARY.num_experts)
    parser.add_argument("--top-k", type=positive, default=PRIMARY.top_k)
    parser.add_argument("--rank", type=positive, default=PRIMARY.rank)
    parser.add_argument("--compiled", action="store_true", help="lmoe's as compiled code too; needs a C++ compiler")
    parser.add_argument("--times", type=positive, default=2, help="runs of which a sample is the mean")
    flags = parser.parse_args(given)
    flags.features = flags.features or SHAPES
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.top_k > flags.experts:
        parser.error(f"--top-k {flags.top_k} of --experts {flags.experts}: at most all of them can be chosen")
    return flags


class Bench:
    """One FFN, its input and the gradient of its output; contestants share them."""

    def __init__(self, features: Sequence[int], dtype: torch.dtype, flags: argparse.Namespace) -> None:
        (hidden, inner), device = features, torch.device(flags.device)
        torch.manual_seed(0)
        config = Qwen3Config(hidden_size=hidden, intermediate_size=inner, hidden_act="silu")
        self.block = Qwen3MLP(config).to(device, dtype).requires_grad_(False)
        self.x = torch.randn(*flags.tokens, hidden).to(device, dtype).requires_grad_()
        self.grad = torch.randn(*flags.tokens, hidden).to(device, dtype)
        self.times: int = flags.times

    def build(self, contestant: Contestant) -> LayerRun:
        """A contestant with the weights that all have."""
        peer = contestant.load()
        module = peer.expand(self.block, contestant.experts).train()
        fill(peer.factors(module, values))
        return LayerRun(module, self.x, self.grad, self.times)

    def outcome(self, contestant: Contestant, run: LayerRun) -> dict[str, Tensor]:
        """Output and gradients of a contestant, by name."""
        run()
        assert self.x.grad is not None
        found = {"x": self.x.grad.clone(), **stacked(contestant.load().factors(run.layer, gradient))}
        with torch.no_grad():
            return {"y": run.layer(self.x), **found}


def agreement(entrants: Sequence[Contestant], features: Sequence[int], flags: argparse.Namespace) -> dict[str, float]:
    """How far outputs and gradients are from the first contestant's, in float32; see `differences`."""
    bench = Bench(features, torch.float32, flags)
    runs, _ = ready([contestant for contestant in entrants if contestant.peer != "frozen"], bench.build)
    return differences({contestant.name: bench.outcome(contestant, run) for contestant, run in runs.items()})


def measure(flags: argparse.Namespace, dtype: str, say: Say) -> Report:
    """All shapes in one type."""
    torch.set_num_threads(flags.threads)
    experts = Experts(flags.experts, flags.rank, flags.top_k)
    rows: list[Row] = []
    skipped: list[Skip] = []
    targets: list[Judged] = []
    agreed: dict[str, str | int] = {}
    for features in flags.features:
        shape = " -> ".join(map(str, features))
        entrants = chosen(expert_ffn_contestants(experts, compiled=flags.compiled), flags.only)
        agreed[f"agreement {shape}"] = in_words(agreement(entrants, features, flags))
        say(f"{dtype} {shape}: {agreed[f'agreement {shape}']}")
        runs, notes = ready(entrants, Bench(features, DTYPES[dtype], flags).build)
        by_name = {contestant.name: run for contestant, run in runs.items()}
        timed = interleave(
            by_name, PARTS, warmup=flags.warmup, repeats=flags.repeats, progress=lambda text: say(f"  {text}")
        )
        rows += [
            Row(
                group=shape,
                name=contestant.name,
                timed=timed[contestant.name],
                reference_name=contestant.reference,
                reference=timed.get(contestant.reference),
                trained=sum(parameter.numel() for parameter in run.layer.parameters() if parameter.requires_grad),
            )
            for contestant, run in runs.items()
        ]
        skipped += notes
        wanted = expert_ffn_targets(experts, compiled=flags.compiled)
        targets += judge(tuple(replace(target, what=f"{shape}: {target.what}") for target in wanted), timed, {})
    return Report(
        title=f"One FFN turned into experts, {dtype}, {flags.device}",
        command=command(flags, dtype),
        machine=machine.facts(torch.device(flags.device)),
        work={
            "dtype": dtype,
            "tokens": flags.tokens[0] * flags.tokens[1],
            "warmup": flags.warmup,
            "repeats": flags.repeats,
            "times": flags.times,
            **agreed,
        },
        parts=PARTS,
        rows=rows,
        skipped=list(dict.fromkeys(skipped)),
        targets=targets,
        reference="the frozen FFN",
    )


def command(flags: argparse.Namespace, dtype: str) -> str:
    """What to type for the same again."""
    words = [f"python -m benchmarks.expert_ffn --dtype {dtype}"]
    words += [f"--features {hidden} {inner}" for hidden, inner in flags.features]
    words += [f"--experts {flags.experts} --top-k {flags.top_k} --rank {flags.rank}"]
    words += [f"--tokens {flags.tokens[0]}x{flags.tokens[1]} --repeats {flags.repeats} --times {flags.times}"]
    words += ["--compiled"] if flags.compiled else []
    return " ".join([*words, *(f'--only "{name}"' for name in flags.only or ())])


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0 if no target is missed."""
    flags = arguments(given)
    return run_types(flags, measure, lambda dtype: f"expert_ffn_{flags.device}_{dtype}")


if __name__ == "__main__":
    sys.exit(main())
