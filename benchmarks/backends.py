"""Where the grouped backend overtakes the stacked one: `make bench-backends`.

The rules that follow from it are in lmoe/ops/card_rules.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import machine
from benchmarks.experts import Experts
from benchmarks.flags import positive, shared_flags
from benchmarks.layer import PARTS, LayerRun
from benchmarks.peers.lmoe_mixture import wrap
from benchmarks.step import DTYPES
from benchmarks.timing import interleave, ratio
from lmoe.vocabulary import Backend

SETTINGS = tuple(
    Experts(num_experts, rank, top_k)
    for top_k in (2, 4)
    for num_experts, rank in ((8, 8), (8, 16), (16, 8), (16, 16), (32, 8), (16, 32), (32, 16), (64, 16), (32, 48))
)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command, checked."""
    parser = shared_flags(__doc__, "benchmarks.backends", repeats=7, tokens="4x256")
    parser.add_argument("--features", type=positive, nargs=2, default=[640, 1920], metavar=("IN", "OUT"))
    flags = parser.parse_args(given)
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return flags


def measure(flags: argparse.Namespace, dtype: str) -> list[dict[str, float]]:
    """grouped / stacked of both directions of an FFN, D -> O and O -> D, forward and backward together."""
    device, rows = torch.device(flags.device), []
    for experts in SETTINGS:
        row: dict[str, float] = {"E": experts.num_experts, "r": experts.rank, "k": experts.top_k}
        for wide_in, wide_out in (flags.features, flags.features[::-1]):
            runs = {backend.value: _run(backend, experts, wide_in, wide_out, dtype, flags, device) for backend in
                    (Backend.stacked, Backend.grouped)}  # fmt: skip
            timed = interleave(runs, PARTS, warmup=flags.warmup, repeats=flags.repeats, progress=lambda text: None)
            row[f"{wide_in}->{wide_out}"] = round(ratio(timed["grouped"], timed["stacked"]), 3)
        rows.append(row)
        sys.stdout.write(f"{dtype} {row}\n")
    return rows


def _run(
    backend: Backend,
    experts: Experts,
    wide_in: int,
    wide_out: int,
    dtype: str,
    flags: argparse.Namespace,
    device: torch.device,
) -> LayerRun:
    torch.manual_seed(0)
    linear = nn.Linear(wide_in, wide_out, bias=False, device=device, dtype=DTYPES[dtype]).requires_grad_(False)
    x = torch.randn(*flags.tokens, wide_in, device=device, dtype=DTYPES[dtype], requires_grad=True)
    grad = torch.randn(*flags.tokens, wide_out, device=device, dtype=DTYPES[dtype])
    return LayerRun(wrap(linear, experts, backend).train(), x, grad, times=2)


def main(given: Sequence[str] | None = None) -> int:
    """Write benchmarks/results/backends_<device>.json."""
    flags = arguments(given)
    torch.set_num_threads(flags.threads)
    found = {
        "machine": machine.facts(torch.device(flags.device)),
        "tokens": flags.tokens[0] * flags.tokens[1],
        "grouped / stacked": {dtype: measure(flags, dtype) for dtype in dict.fromkeys(flags.dtype or DTYPES)},
    }
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    target = flags.output_dir / f"backends_{flags.device}.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
