"""The flags that the benchmarks share."""

import argparse
from pathlib import Path

from benchmarks.step import DTYPES
from lmoe.cli.threads import own_cores

RESULTS = Path(__file__).resolve().parent / "results"


def shared_flags(description: str | None, module: str, *, repeats: int, tokens: str) -> argparse.ArgumentParser:
    """A parser to which a benchmark adds its own."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all of them")
    parser.add_argument("--repeats", type=positive, default=repeats, help="counted rounds")
    parser.add_argument("--warmup", type=positive, default=2, help="rounds before them")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="contestants whose name starts so; may be repeated; references stay in",
    )
    parser.add_argument("--threads", type=positive, default=own_cores(), help="of torch; default: every core")
    parser.add_argument("--tokens", type=batch_shape, default=tokens, metavar="BxT", help="sequences x length")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser


def batch_shape(text: str) -> tuple[int, int]:
    """4x256 to (4, 256).

    Raises:
        ArgumentTypeError: anything else.
    """
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not sequences x length, as in 4x256")
    return int(batch), int(length)


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
