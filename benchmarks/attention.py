"""Attention with and without a mask of padding, and ways to keep packed rows apart: `make bench-attention`.

Attention alone, as a layer calls it; all ways agree on the valid tokens before anything is timed. FlexAttention has no
backward on a CPU, so that it is compared there by its forward.

Shapes: B sequences of T tokens, H heads, of which G share a key, D in a head.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.flags import RESULTS, batch_shape, positive
from benchmarks.machine import facts
from benchmarks.step import DTYPES
from benchmarks.timing import Clock, Laps, Timed, interleave, ratio
from lmoe.cli.threads import own_cores

HEADS, KEY_HEADS, WIDTH = 16, 8, 64
MASKED, CAUSAL = "mask of padding", "no mask"
DENSE, ROWS, FLEX = "mask of all tokens", "row by row", "FlexAttention"
AGREE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference of an output of a valid token."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True, frozen=True, kw_only=True)
class Case:
    """What is compared.

    Args:
        name: in a table.
        reference: the way that the others are compared with.
        ways: by name.
        valid: (B, T) bool.
        backward: whether gradients are computed too.
    """

    name: str
    reference: str
    ways: dict[str, Attention]
    valid: Tensor
    backward: bool


def masked(mask: Tensor) -> Attention:
    """Attention under a mask, with keys and values repeated to all heads, as Transformers does then."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel says itself what is causal."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def row_by_row(bounds: list[int]) -> Attention:
    """One call for each row."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, width = q.shape
        flat = [part.transpose(1, 2).reshape(1, batch * length, -1, width).transpose(1, 2) for part in (q, k, v)]
        pieces = pairwise(bounds)
        rows = [causal(*(part[:, :, start:end] for part in flat)) for start, end in pieces]
        return torch.cat(rows, 2).transpose(1, 2).reshape(batch, length, heads, width).transpose(1, 2)

    return attention


def cases(shape: tuple[int, int], row: int, device: torch.device) -> list[Case]:
    """Padded batches, of which a quarter is padding, and packed ones of rows of `row` tokens."""
    batch, length = shape
    ends = torch.linspace(length / 2, length, batch, device=device).round().unsqueeze(1)
    place = torch.arange(length, device=device)
    valid = place < ends
    seen = place[:, None] >= place[None]
    numbers = (place // row).expand(shape)
    together = (numbers[:, :, None] == numbers[:, None, :]) & seen
    starts = [sequence * length + at for sequence in range(batch) for at in range(0, length, row)]
    packed = {DENSE: masked(together[:, None]), ROWS: row_by_row([*starts, batch * length])}
    block = create_block_mask(
        lambda b, h, i, j: (numbers[b, i] == numbers[b, j]) & (i >= j), batch, None, length, length, device=str(device)
    )
    flex = partial(torch.compile(flex_attention), block_mask=block, enable_gqa=True)
    every = torch.ones(shape, dtype=torch.bool, device=device)
    title, flex_too = f"packed rows of {row} tokens", packed | {FLEX: flex}
    padding = {MASKED: masked((seen & valid[:, None, :])[:, None]), CAUSAL: causal}
    cuda = device.type == "cuda"
    return [
        Case(name="padded on the right", reference=MASKED, ways=padding, valid=valid, backward=True),
        Case(name=title, reference=DENSE, ways=flex_too if cuda else packed, valid=every, backward=True),
        Case(name=f"{title}, forward", reference=DENSE, ways=flex_too, valid=every, backward=False),
    ]


def run(attention: Attention, inputs: tuple[Tensor, ...], *, backward: bool) -> Laps:
    """Milliseconds of one call."""
    clock = Clock(inputs[0].device)
    if backward:
        attention(*inputs).sum().backward()
    else:
        with torch.no_grad():
            attention(*inputs)
    clock.mark()
    for part in inputs:
        part.grad = None
    return clock.laps()


def measure(flags: argparse.Namespace, case: Case, dtype: str) -> dict[str, Timed]:
    """Times of the ways of a case, interleaved.

    Raises:
        SystemExit: two of them disagree.
    """
    device, (batch, length) = torch.device(flags.device), flags.tokens
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(batch, heads, length, WIDTH, generator=generator).to(device, DTYPES[dtype])
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    for part in inputs:
        part.requires_grad_(case.backward)
    with torch.no_grad():
        outputs = {way: attention(*inputs).transpose(1, 2)[case.valid] for way, attention in case.ways.items()}
    for way, output in outputs.items():
        apart = float((output - outputs[case.reference]).float().abs().max())
        if apart > AGREE[dtype]:
            raise SystemExit(f"{case.name}: {way} is {apart:.1e} away from {case.reference}")
    runs = {way: partial(run, attention, inputs, backward=case.backward) for way, attention in case.ways.items()}
    return interleave(
        runs,
        ("attention",),
        warmup=2,
        repeats=flags.repeats,
        progress=lambda at: say(f"{dtype}, {case.name}: {at}"),
    )


Found = list[tuple[str, Case, dict[str, Timed]]]
"""Type, case, and the times of its ways."""


def as_json(found: Found, command: str, machine: dict[str, str | int]) -> dict:
    """The samples of every way in milliseconds, and its ratio."""
    results = [
        {"dtype": dtype, "case": case.name, "way": way, "ms": one.of(), "ratio": ratio(one, timed[case.reference])}
        for dtype, case, timed in found
        for way, one in timed.items()
    ]
    return {"command": command, "machine": machine, "results": results}


def as_markdown(found: Found, command: str, machine: dict[str, str | int]) -> str:
    """A page with a row a way."""
    lines = ["# Attention with and without masks", "", f"`{command}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["Attention alone, forward and backward where nothing else is said; medians. The ratio is the median over"]
    lines += [
        "the repeats of the ratio within one.",
        "",
        "| type | case | way | ms | ratio |",
        "|---|---|---|---:|---:|",
    ]
    for dtype, case, timed in found:
        for way, one in timed.items():
            cells = (dtype, case.name, way, f"{statistics.median(one.of()):.1f}")
            lines.append(f"| {' | '.join(cells)} | {ratio(one, timed[case.reference]):.2f} |")
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    """Prints to the terminal, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--tokens", type=batch_shape, default="4x512", metavar="BxT", help="sequences x length")
    parser.add_argument("--row", type=positive, default=128, help="tokens of a packed row")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all of them")
    parser.add_argument("--repeats", type=positive, default=15, help="counted rounds")
    parser.add_argument("--threads", type=positive, default=own_cores(), help="of torch; default: every core")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    flags = arguments(argv)
    torch.set_num_threads(flags.threads)
    shape = {"B x T": "x".join(map(str, flags.tokens)), "heads": HEADS, "of keys": KEY_HEADS, "width": WIDTH}
    machine = facts(torch.device(flags.device)) | shape | {"repeats": flags.repeats}
    command = shlex.join(["python", "-m", "benchmarks.attention", *(sys.argv[1:] if argv is None else argv)])
    found = [
        (dtype, case, measure(flags, case, dtype))
        for dtype in flags.dtype or DTYPES
        for case in cases(flags.tokens, flags.row, torch.device(flags.device))
    ]
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(found, command, machine), indent=1, ensure_ascii=False)
    (flags.output_dir / "attention.json").write_text(text + "\n", encoding="utf-8")
    page = as_markdown(found, command, machine)
    (flags.output_dir / "attention.md").write_text(page, encoding="utf-8")
    say(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
