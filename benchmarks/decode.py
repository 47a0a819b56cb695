"""Tokens a second of blends beside the base, PEFT, X-LoRA and a loop: `make bench-decode`.

Batch 1, a KV cache, random weights. All contestants of a type live in one process around the same frozen weights, and
take turns, token by token; memory is measured in processes of their own.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lmoe
from benchmarks import decode_entrants as peers
from benchmarks import machine, memory
from benchmarks.decode_entrants import Entrant, decode, prefill, write_experts
from benchmarks.decode_results import DecodeReport, Line
from benchmarks.flags import positive, shared_flags
from benchmarks.models import SIZES, random_model
from benchmarks.runs import Say
from benchmarks.step import DTYPES
from benchmarks.targets import Judged, Target
from benchmarks.timing import Laps, Timed, interleave, ratio

SHAPE = ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab")
COUNTS = (1, 2, 4, 8, 16)
PEERS = 4
"""Experts of the other contestants."""
SLOW = "base, beside those without a cache"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command, checked."""
    parser = shared_flags(__doc__, "benchmarks.decode", repeats=7, tokens="1x128")
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--layers", type=positive, help="default: those of the size")
    parser.add_argument("--rank", type=positive, default=32)
    parser.add_argument(
        "--steps", type=positive, default=8, help="tokens after the prompt, a repeat; without a cache 1"
    )
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args(given)
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    flags.shape = replace(SIZES[flags.size], layers=flags.layers or SIZES[flags.size].layers)
    return flags


def base_model(flags: argparse.Namespace, dtype: str) -> PreTrainedModel:
    """A model in evaluation mode, with its cache on."""
    model = random_model(flags.shape, DTYPES[dtype], torch.device(flags.device)).eval()
    model.config.use_cache = True
    return model


def entrants(
    base: PreTrainedModel, places: dict[str, Path], only: list[str] | None
) -> tuple[list[Entrant], dict[str, str]]:
    """All, or those whose name starts as asked; and who cannot take part."""
    makers = {
        **{f"lmoe blend {count}": lambda count=count: peers.blending(base, places, count) for count in COUNTS},
        f"lmoe blend {PEERS}, folded": lambda: peers.folded(base, places, PEERS),
        "peft one adapter": lambda: peers.peft_one(base, places),
        f"peft cat {PEERS}": lambda: peers.peft_cat(base, places, PEERS),
        f"peft xlora {PEERS}": lambda: peers.peft_xlora(base, places, PEERS),
        f"loop {PEERS}": lambda: peers.loop(base, places, PEERS),
    }
    found, skipped = [Entrant(name="base", model=base)], {}
    for name, make in makers.items():
        if only and not name.startswith(tuple(only)):
            continue
        try:
            found.append(make())
        except Exception as error:  # what a peer raises is its own affair; the others go on
            if name.startswith("lmoe"):
                raise
            skipped[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return found, skipped


def measure(flags: argparse.Namespace, dtype: str, say: Say) -> DecodeReport:
    """All contestants in one type."""
    torch.set_num_threads(flags.threads)
    base = base_model(flags, dtype)
    prompt = torch.randint(3, flags.shape.vocab, flags.tokens, generator=torch.Generator().manual_seed(0)).to(
        base.device
    )
    read = sum(m.weight.nbytes for m in base.modules() if isinstance(m, nn.Linear))
    with TemporaryDirectory() as folder:
        places = write_experts(base, Path(folder), max(COUNTS) + 1, flags.rank)
        *_, spare = places.values()
        found, skipped = entrants(base, places, flags.only)
        times = samples(found, prompt, flags, say)
        lines = []
        for entrant in found:
            line = Line(
                name=entrant.name,
                timed=times[entrant.name],
                base=times["base" if entrant.cached else SLOW],
                tokens=prompt.numel(),
                limit=read / (read + entrant.expert_bytes),
            )
            if entrant.blend is not None:
                weights_ms, sets_ms = changes(entrant.blend)
                add_ms, remove_ms = comings(entrant.blend, spare)
                line = replace(line, weights_ms=weights_ms, sets_ms=sets_ms, add_ms=add_ms, remove_ms=remove_ms)
                if not flags.no_memory:
                    say(f"memory of {entrant.name}")
                    line = replace(line, memory=memory_of(flags, dtype, len(entrant.blend.names), entrant.expert_bytes))
            lines.append(line)
    return DecodeReport(
        title=f"Decoding, {flags.size} with {flags.shape.layers} layers, {dtype}, {flags.device}",
        command=command(flags, dtype),
        machine=machine.facts(torch.device(flags.device)),
        work={
            **{
                name: value for name, value in asdict(flags.shape).items() if name not in ("needs_accelerator", "top_k")
            },
            "rank": flags.rank,
            "prompt": prompt.numel(),
            "steps": flags.steps,
            "repeats": flags.repeats,
        },
        lines=lines,
        targets=[*(_speed(times, *bound) for bound in _bounds()), *_others(lines)],
        skipped=skipped,
    )


def samples(found: list[Entrant], prompt: Tensor, flags: argparse.Namespace, say: Say) -> dict[str, Timed]:
    """Times of each contestant: as many prompts as repeats, and so many times `steps` tokens.

    A turn is one token, so that a slow moment of the machine meets all. Who has no cache takes turns with the base
    alone, which is in the result a second time for that, as SLOW.
    """

    def turns(part: str, some: list[Entrant], make: Callable[[Entrant, Tensor], Callable[[], Laps]], repeats: int):
        runs = {entrant.name: make(entrant, prompt) for entrant in some}
        return interleave(
            runs, (part,), warmup=flags.warmup, repeats=repeats, progress=lambda text: say(f"{part}: {text}")
        )

    prefills = turns("prefill", found, prefill, flags.repeats)
    cached = [entrant for entrant in found if entrant.cached]
    decodes = turns("decode", cached, decode, flags.repeats * flags.steps)
    if len(cached) < len(found):
        slow = turns(
            "decode", [cached[0], *(entrant for entrant in found if not entrant.cached)], decode, flags.repeats
        )
        decodes[SLOW] = slow.pop(cached[0].name)
        decodes, prefills[SLOW] = decodes | slow, prefills[cached[0].name]
    return {name: Timed({**prefills[name].parts, **decodes[name].parts}) for name in decodes}


def changes(blend: "lmoe.Blend") -> tuple[float, float]:
    """Median milliseconds of new weights for all experts, and of another set of experts; then all are on again."""
    weights, sets = [], []
    for turn in range(20):
        for kept, given in (
            (weights, {name: 0.1 + (turn + number) % 7 for number, name in enumerate(blend.names)}),
            (sets, {name: float((turn + number) % 2) for number, name in enumerate(blend.names)}),
        ):
            blend.weights = dict.fromkeys(blend.names, 1.0)
            start = time.perf_counter()
            blend.weights = given
            kept.append(1000 * (time.perf_counter() - start))
    blend.weights = dict.fromkeys(blend.names, 1.0)
    return statistics.median(weights), statistics.median(sets)


def comings(blend: "lmoe.Blend", spare: Path) -> tuple[float, float]:
    """Median milliseconds to add one more expert to a live model, read from its files, and to remove it again."""
    added, removed = [], []
    for _ in range(5):
        start = time.perf_counter()
        blend.add("spare", spare)
        middle = time.perf_counter()
        blend.remove("spare")
        added.append(1000 * (middle - start))
        removed.append(1000 * (time.perf_counter() - middle))
    return statistics.median(added), statistics.median(removed)


def memory_of(flags: argparse.Namespace, dtype: str, count: int, expert_bytes: int) -> float:
    """Peak of a process that makes a blend and answers, over the base's memory and the experts' bytes."""
    words = [
        *_shape(flags),
        "--device",
        flags.device,
        "--dtype",
        dtype,
        "--threads",
        str(flags.threads),
        "--memory-of",
        str(count),
    ]
    peak = memory.in_own_process("benchmarks.decode", *words)
    return peak.peak / (peak.base + expert_bytes / memory.MB)


def answer(entrant: Entrant, prompt: Tensor) -> None:
    """The prompt and two tokens."""
    prefill(entrant, prompt)()
    step = decode(entrant, prompt)
    for _ in range(2):
        step()


def print_peak(flags: argparse.Namespace) -> None:
    """The memory of one blend, in this process, which must be a fresh one."""
    torch.set_num_threads(flags.threads)
    dtype, device = flags.dtype[0], torch.device(flags.device)
    base = base_model(flags, dtype)
    prompt = torch.randint(3, flags.shape.vocab, flags.tokens, generator=torch.Generator().manual_seed(0)).to(
        base.device
    )
    with TemporaryDirectory() as folder:
        places = write_experts(base, Path(folder), flags.memory_of, flags.rank)
        answer(Entrant(name="base", model=base), prompt)
        before = memory.settle(device)
        lmoe.Blend(base, places)
        answer(Entrant(name="blend", model=base), prompt)
        peak = memory.Peak(base=before, peak=memory.peak(device))
    sys.stdout.write(json.dumps(asdict(peak)) + "\n")


def _bounds() -> list[tuple[str, float | None, float]]:
    return [
        (f"lmoe blend {PEERS}", 0.80, 0.85),
        (f"lmoe blend {PEERS}, folded", 0.99, 1.0),
        ("lmoe blend 16", 0.5, 0.6),
    ]


def _speed(times: dict[str, Timed], name: str, limit: float | None, aim: float) -> Judged:
    target = Target(
        what=f"decoding, {name} to the base's tokens/s",
        mine="base",
        theirs=name,
        part="decode",
        limit=limit,
        aim=aim,
        at_least=True,
    )
    return Judged(target=target, measured=ratio(times["base"], times[name], "decode") if name in times else None)


def _others(lines: list[Line]) -> list[Judged]:
    """Changes and memory, the worst of all blends."""
    slowest = [line.weights_ms for line in lines if line.weights_ms is not None]
    fullest = [line.memory for line in lines if line.memory is not None]
    return [
        Judged(
            target=Target(what="milliseconds to change weights", mine="", theirs="", limit=5.0),
            measured=max(slowest, default=None),
        ),
        Judged(
            target=Target(what="peak memory over base + experts", mine="", theirs="", limit=1.1),
            measured=max(fullest, default=None),
        ),
    ]


def _shape(flags: argparse.Namespace) -> list[str]:
    own = ["--size", flags.size, "--layers", str(flags.shape.layers), "--rank", str(flags.rank)]
    return [*own, "--tokens", f"{flags.tokens[0]}x{flags.tokens[1]}"]


def command(flags: argparse.Namespace, dtype: str) -> str:
    """What to type for the same again."""
    words = [
        "python -m benchmarks.decode",
        *_shape(flags),
        f"--device {flags.device} --dtype {dtype} --threads {flags.threads}",
    ]
    words += [f"--repeats {flags.repeats} --steps {flags.steps}", *(f'--only "{name}"' for name in flags.only or ())]
    return " ".join([*words, *(["--no-memory"] if flags.no_memory else [])])


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0 if no target is missed."""
    flags = arguments(given)
    if flags.memory_of is not None:
        print_peak(flags)
        return 0
    missed = False
    for dtype in dict.fromkeys(flags.dtype or DTYPES):
        report = measure(flags, dtype, lambda text: print(text, file=sys.stderr, flush=True))
        sys.stdout.write(report.write(flags.output_dir, f"decode_{flags.device}_{flags.size}_{dtype}") + "\n")
        missed |= any(judged.verdict == "missed" for judged in report.targets)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
