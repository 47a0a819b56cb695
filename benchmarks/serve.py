"""What serving many mixtures at once is worth, and what an expert that comes costs a live server.

`python -m benchmarks.serve`. Random weights of a published shape, greedy answers of a fixed length, all ways in turn
within each round: eight clients with eight mixtures at once, the same clients one after the other, eight clients with
one mixture, one client whose tokens are streamed, and `generate` of the same blend. Then experts come one by one.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import lmoe
from benchmarks.decode_entrants import write_experts
from benchmarks.flags import positive
from benchmarks.machine import facts
from benchmarks.models import SIZES, random_model
from lmoe.blend.stack import ReadExpert
from lmoe.peft.reader import read_header
from lmoe.serve.engine.engine import BatchEngine
from lmoe.serve.engine.mixing import BlendMixing
from lmoe.serve.engine.paged import PagedSettings
from lmoe.serve.request import Request, SamplingSettings

MODULE = "benchmarks.serve"
CLIENTS = 8
ADDED = 20
TARGETS = {
    "mixtures_over_sequence": ("8 mixtures at once, tokens/s over one after the other", 3.0, True),
    "mixtures_over_one": ("8 mixtures at once, tokens/s over 8 clients of one mixture", 0.8, True),
    "stream_over_generate": ("time of a streamed token over `generate`", 1.1, False),
    "add_ms": ("an expert that comes, beyond reading its file, ms (median)", 50.0, False),
    "step_after_adding": ("time of a token after experts have come over before", 1.05, False),
}
"""By figure: what it is, its bound, and whether the bound is from below."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """Medians over rounds of ratios within a round, and what they were made from.

    Args:
        seconds: of each way, by round.
    """

    mixtures_over_sequence: float
    mixtures_over_one: float
    stream_over_generate: float
    add_ms: float
    step_after_adding: float
    seconds: dict[str, list[float]]
    added_ms: list[float]


class Clients:
    """Requests as clients send them.

    Args:
        engine: that answers.
        prompts: of the clients.
        tokens: of each answer.
    """

    def __init__(self, engine: BatchEngine, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.engine, self.prompts, self.tokens = engine, prompts, tokens

    async def one(self, number: int, mixture: dict[str, float]) -> float:
        """Seconds from the first token of an answer to its last."""
        request = Request(
            prompt=self.prompts[number], max_tokens=self.tokens, end_tokens=frozenset(),
            sampling=SamplingSettings(temperature=0), mixture=mixture,
        )  # fmt: skip
        running, times = await self.engine.submit(request), []
        async with aclosing(running.tokens()) as tokens:  # type: ignore[type-var]
            async for _ in tokens:
                times.append(time.perf_counter())
        assert len(times) == self.tokens
        return times[-1] - times[0]

    async def at_once(self, mixtures: Sequence[dict[str, float]]) -> None:
        """Send all of them at the same time."""
        await asyncio.gather(*[self.one(number, mixture) for number, mixture in enumerate(mixtures)])

    async def in_turn(self, mixtures: Sequence[dict[str, float]]) -> None:
        """One after the other."""
        for number, mixture in enumerate(mixtures):
            await self.one(number, mixture)


async def seconds_of(work: Callable[[], Awaitable[object]]) -> float:
    """Returns the wall time of some work."""
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def measured(flags: argparse.Namespace, folder: Path) -> Figures:
    """All figures of one model."""
    size = SIZES[flags.size]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[flags.dtype]
    model = random_model(size, dtype, torch.device("cpu")).eval()
    model.config.use_cache = True
    places = write_experts(model, folder, CLIENTS + 1, flags.rank)
    *_, spare = places
    blend = lmoe.Blend(model, {name: places[name] for name in places if name != spare}, room=flags.rank * (ADDED + 1))
    names = blend.names
    sizes = PagedSettings(max_requests=CLIENTS, max_batch_tokens=512, cache_tokens=4096)
    engine = BatchEngine(model, BlendMixing(model, blend), sizes, max_waiting=64, context=4096)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, size.vocab, (flags.prompt,), generator=draw).tolist() for _ in range(CLIENTS)]
    clients = Clients(engine, prompts, flags.tokens)
    mixtures = [{name: 0.7, names[(number + 1) % CLIENTS]: 0.3} for number, name in enumerate(names)]

    def generated() -> float:
        ids, times = torch.tensor([prompts[0]]), []

        class Stamps:
            def put(self, _: object) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        with torch.no_grad(), blend.using(mixtures[0]):
            model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=flags.tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0, streamer=Stamps(),
            )  # fmt: skip
        return times[-1] - times[1]  # the first put is the prompt

    seconds: dict[str, list[float]] = {name: [] for name in ("mixtures", "in turn", "one", "stream", "generate")}
    for number in range(flags.warmup + flags.repeats):
        found = {
            "mixtures": await seconds_of(lambda: clients.at_once(mixtures)),
            "one": await seconds_of(lambda: clients.at_once([mixtures[0]] * CLIENTS)),
            "stream": await clients.one(0, mixtures[0]),
            "generate": await asyncio.to_thread(generated),
            "in turn": await seconds_of(lambda: clients.in_turn(mixtures)),
        }
        sys.stderr.write(f"round {number}: {found}\n")
        if number >= flags.warmup:
            for name, value in found.items():
                seconds[name].append(value)
    added: list[float] = []
    before, after = [], []
    for number in range(flags.warmup + flags.repeats):  # without the experts that come and with them, in turn
        alone = await clients.one(0, mixtures[0])
        new = [f"new{number}-{each}" for each in range(ADDED)]
        spent = [await _added(engine, blend, name, places[spare]) for name in new]
        crowded = await clients.one(0, mixtures[0])
        for name in new:
            await engine.remove(name)
        if number >= flags.warmup:
            added, before, after = [*added, *spent], [*before, alone], [*after, crowded]
    await engine.stop(0)

    def ratio(mine: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[mine], seconds[theirs], strict=True))

    return Figures(
        mixtures_over_sequence=ratio("in turn", "mixtures"),
        mixtures_over_one=ratio("one", "mixtures"),
        stream_over_generate=ratio("stream", "generate"),
        add_ms=statistics.median(added),
        step_after_adding=statistics.median(a / b for a, b in zip(after, before, strict=True)),
        seconds=seconds,
        added_ms=added,
    )


async def _added(engine: BatchEngine, blend: lmoe.Blend, name: str, place: Path) -> float:
    """Milliseconds that adding an expert takes beyond reading its file and digesting it."""
    began = time.perf_counter()
    ReadExpert.of(read_header(place, blend.model, base=blend.base))
    read = time.perf_counter()
    held = blend._stack.add
    spent: list[float] = []

    def timed(*given: object) -> None:
        start = time.perf_counter()
        held(*given)  # type: ignore[arg-type]
        spent.append(time.perf_counter() - start)

    blend._stack.add = timed  # type: ignore[method-assign]
    try:
        await engine.add(name, str(place))
    finally:
        blend._stack.add = held  # type: ignore[method-assign]
    sys.stderr.write(f"{name}: read {1000 * (read - began):.0f} ms, taken {1000 * spent[0]:.1f} ms\n")
    return 1000 * spent[0]


def lines(figures: Figures) -> list[str]:
    """The table, with what is asked."""
    found = ["| figure | measured | asked | kept |", "|---|---|---|---|"]
    for name, (what, bound, from_below) in TARGETS.items():
        value = getattr(figures, name)
        kept = value >= bound if from_below else value <= bound
        found.append(f"| {what} | {value:.2f} | {'≥' if from_below else '≤'} {bound:g} | {'yes' if kept else 'no'} |")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rank", type=positive, default=32)
    parser.add_argument("--prompt", type=positive, default=16, help="tokens of each prompt")
    parser.add_argument("--tokens", type=positive, default=24, help="of each answer")
    parser.add_argument("--repeats", type=positive, default=3, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    flags = parser.parse_args(given)
    torch.set_num_threads(flags.threads)
    with TemporaryDirectory() as folder:
        figures = asyncio.run(measured(flags, Path(folder)))
    about = facts(torch.device("cpu"))
    if flags.output is not None:
        flags.output.write_text(json.dumps({"machine": about, **asdict(figures)}, indent=1) + "\n")
    sys.stdout.write("\n".join([*lines(figures), "", json.dumps(about)]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
