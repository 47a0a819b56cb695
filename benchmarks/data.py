"""Reading and tokenising rows, their memory, the start from the cache, and rows read while training: `make bench-data`.

Everything is measured in a process of its own, from where lmoe, datasets and the tokenizer stand: anonymous memory
(RssAnon, which pages of mapped files are no part of), rows a second, and seconds until the first batch.
"""

import argparse
import gc
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType

import torch

from benchmarks.flags import RESULTS, positive
from benchmarks.machine import facts
from lmoe.config.data import DataConfig

WORDS = (
    *("the", "a", "of", "and", "to", "in", "that", "it", "is", "was", "for", "on", "are", "with", "as", "his", "they"),
    *("be", "at", "one", "have", "this", "from", "or", "had", "by", "hot", "but", "some", "what", "there", "we", "can"),
    *("out", "other", "were", "all", "your", "when", "up", "use", "word", "how", "said", "an", "each", "she", "which"),
)
ROW_CHARACTERS = 260
"""Of a prompt and its answer together, about: 200,000 rows are some 70 MB."""
LENGTH = 256
MOST_MEMORY, FASTER_WITH_TWO, MOST_SECONDS_WARM = 400e6, 1.7, 2.0
LEVEL_MEMORY, LEVEL_TIME, FEW_TURNS = 1.02, 1.15, 5.0


class AnonymousPeak:
    """The most anonymous memory of this process while it is entered, above what it had then (`base`); looked at all the
    time."""

    def __init__(self) -> None:
        self.bytes = self.base = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> "AnonymousPeak":
        gc.collect()
        self.base = anonymous_bytes()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes() - self.base)


def anonymous_bytes() -> float:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status; this needs Linux")


def in_own_process(act: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """What a function of this file measures in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(act, *arguments).result()


def write_rows(file: Path, count: int) -> None:
    """Write rows of words in a seeded order, no two alike."""
    generator = torch.Generator().manual_seed(0)
    with open(file, "w", encoding="utf-8") as stream:
        for first in range(0, count, 10_000):
            picks = torch.randint(len(WORDS), (10_000, 64), generator=generator).tolist()
            for number, row in enumerate(picks[: count - first], start=first):
                words = [WORDS[index] for index in row]
                record = {"prompt": f"Row {number}: {' '.join(words[:32])}?", "response": f"{' '.join(words[32:])}."}
                stream.write(json.dumps(record) + "\n")


def config(file: Path, cache: Path, **options: object) -> DataConfig:
    """The data section of all measurements."""
    given = {"path": str(file), "val_path": str(file), "cache_dir": str(cache), "max_length": LENGTH, "batch_size": 8}
    return DataConfig(**(given | {"packing": False} | options))  # type: ignore[arg-type]


def load_tokenizer():  # of the tiny base
    """The tokenizer that ships with lmoe."""
    import datasets  # noqa: F401 # it counts as what stands before

    from lmoe.backbones.load import load_tokenizer as load
    from lmoe.config.backbone import BackboneConfig

    return load(BackboneConfig())


def cold(file: str, cache: str, num_proc: int) -> dict[str, float]:
    """Tokenise all rows of a file that are in no cache, each process in one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own: this one was spawned
    from lmoe.data.reader import Reader
    from lmoe.data.rows.sources import Source

    tokenizer = load_tokenizer()
    reader = Reader(config(Path(file), Path(cache), num_proc=num_proc), tokenizer)
    with AnonymousPeak() as peak:
        started = time.perf_counter()
        found = reader.read(Source(key="data.path", path=file))
        seconds = time.perf_counter() - started
    return {"rows_per_second": len(found.rows) / seconds, "seconds": seconds, "memory": peak.bytes}


def warm(file: str, val: str, cache: str) -> dict[str, float]:
    """Measure from opening to the first batch, with everything in the cache."""
    from lmoe.data.collate import Collate
    from lmoe.data.datamodule import TrainingData
    from lmoe.data.prepare import prepare

    tokenizer, settings = load_tokenizer(), config(Path(file), Path(cache), val_path=val)
    with AnonymousPeak() as peak:
        started = time.perf_counter()
        prepared = prepare(settings, tokenizer, seed=0, bundled=Path(), packing_model_type=None)
        data = TrainingData(
            prepared,
            settings,
            units=lambda samples: samples.label_counts,
            collate=Collate,
            seed=0,
            max_steps=1000,
            accumulate_grad_batches=1,
            pad_token_id=0,
        )
        next(iter(data.train_dataloader()))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": peak.bytes, "hits": sum(s.cache_hit for s in prepared.report.sources)}


def streamed(file: str, val: str, cache: str, marks: list[int]) -> dict[str, float]:
    """Measure the memory of the process and the time of a row that is read while training, at some numbers of rows."""
    from lmoe.data.collate import Collate
    from lmoe.data.datamodule import TrainingData
    from lmoe.data.prepare import prepare

    settings = config(Path(file), Path(cache), val_path=val, streaming=True)
    prepared = prepare(settings, load_tokenizer(), seed=0, bundled=Path(), packing_model_type=None)
    data = TrainingData(
        prepared,
        settings,
        units=lambda samples: samples.label_counts,
        collate=Collate,
        seed=0,
        max_steps=10**9,
        accumulate_grad_batches=1,
        pad_token_id=0,
    )
    batches, found, rows = iter(data.train_dataloader()), {}, 0
    with AnonymousPeak() as peak:
        for mark in marks:
            started, before = time.perf_counter(), rows
            for _ in islice(batches, (mark - rows) // settings.batch_size):
                rows += settings.batch_size
            found[f"seconds_per_row_to_{mark}"] = (time.perf_counter() - started) / max(rows - before, 1)
            found[f"memory_to_{mark}"] = peak.base + peak.bytes
    return found


def turns(count: int, template: str) -> dict[str, float]:
    """Seconds to find what is learnt of one conversation."""
    from lmoe.data.chats.template import ChatTemplate
    from lmoe.data.rows.row import Row

    tokenizer = load_tokenizer()
    tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    messages = tuple(
        {"role": role, "content": f"{role} says {number}"} for number in range(count) for role in ("user", "assistant")
    )
    rendering, row = ChatTemplate.of(tokenizer, None), Row(where="row", domain="all", messages=messages)
    rendering.render(row)
    laps = []
    for _ in range(5):
        started = time.perf_counter()
        rendering.render(row)
        laps.append(time.perf_counter() - started)
    return {"seconds": min(laps)}


def measure(rows: int, stream_rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """All measurements by name; those that are compared take turns."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file, val = folder / "rows.jsonl", folder / "val.jsonl"
        write_rows(file, rows)
        write_rows(val, 200)
        found["rows"] = {"rows": rows, "bytes": file.stat().st_size}
        best: dict[int, dict[str, float]] = {}
        for repeat in range(repeats):
            for processes in (1, 2):
                cache = folder / f"cache{repeat}-{processes}"
                lap = in_own_process(cold, str(file), str(cache), processes)
                if processes not in best or lap["seconds"] < best[processes]["seconds"]:
                    best[processes] = lap
                say(f"tokenised in {processes}: {lap['rows_per_second']:,.0f} rows/s, {lap['memory'] / 1e6:,.0f} MB")
        found |= {f"tokenised in {processes}": lap for processes, lap in best.items()}
        cache = str(folder / "cache0-1")
        in_own_process(warm, str(file), str(val), cache)
        found["from the cache"] = in_own_process(warm, str(file), str(val), cache)
        say(f"from the cache: {found['from the cache']['seconds']:.2f} s")
        stream = folder / "stream.jsonl"
        write_rows(stream, stream_rows)
        marks = [10_000, stream_rows // 20, stream_rows // 2, stream_rows]
        found["streamed"] = in_own_process(streamed, str(stream), str(val), cache, sorted(set(marks)))
        say(f"streamed {stream_rows:,} rows")
        plain, marked = folder / "plain.jinja", folder / "marked.jinja"
        plain.write_text(THINKING.format(begin="", end=""), encoding="utf-8")
        marked.write_text(THINKING.format(begin="{% generation %}", end="{% endgeneration %}"), encoding="utf-8")
        for name, template in (("plain", plain), ("marked", marked)):
            for count in (80, 320):
                found[f"{count} turns, {name}"] = in_own_process(turns, count, str(template))
    return found


THINKING = (
    "{{%- set ns = namespace(last=-1) -%}}{{%- for m in messages -%}}{{%- if m.role == 'user' -%}}"
    "{{%- set ns.last = loop.index0 -%}}{{%- endif -%}}{{%- endfor -%}}{{%- for m in messages -%}}"
    "{{{{- '<|im_start|>' + m.role + '\\n' -}}}}{{%- if m.role == 'assistant' -%}}"
    "{{%- if loop.index0 > ns.last and loop.last -%}}{{{{- '<think>\\n\\n</think>\\n\\n' -}}}}{{%- endif -%}}"
    "{begin}{{{{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>' -}}}}{end}"
    "{{%- else -%}}{{{{- m.content + '<|im_end|>' -}}}}{{%- endif -%}}{{{{- '\\n' -}}}}{{%- endfor -%}}"
)
"""What templates of models that think do: the last turn has an empty block of thoughts."""


def claims(found: dict[str, dict[str, float]]) -> dict[str, tuple[float, float, bool]]:
    """Return by what is claimed the figure, its limit, and whether it is met."""
    one, two, stream = found["tokenised in 1"], found["tokenised in 2"], found["streamed"]
    marks = sorted(int(name.rsplit("_", 1)[1]) for name in stream if name.startswith("memory_to_"))
    memory = stream[f"memory_to_{marks[-1]}"] / stream[f"memory_to_{marks[0]}"]
    pace = stream[f"seconds_per_row_to_{marks[-1]}"] / stream[f"seconds_per_row_to_{marks[1]}"]
    ratio = found["80 turns, plain"]["seconds"] / found["80 turns, marked"]["seconds"]
    growth = found["320 turns, plain"]["seconds"] / found["80 turns, plain"]["seconds"] / 4
    speedup = two["rows_per_second"] / one["rows_per_second"]
    return {
        "anonymous memory above the start, MB": (one["memory"] / 1e6, MOST_MEMORY / 1e6, one["memory"] <= MOST_MEMORY),
        "rows/s of two processes to one, at least": (speedup, FASTER_WITH_TWO, speedup >= FASTER_WITH_TWO),
        "seconds from the cache to a batch": (
            found["from the cache"]["seconds"],
            MOST_SECONDS_WARM,
            found["from the cache"]["seconds"] <= MOST_SECONDS_WARM,
        ),
        "memory of a process that streams, last to 10,000th row": (memory, LEVEL_MEMORY, memory <= LEVEL_MEMORY),
        "time a row of a stream, second half to the beginning": (pace, LEVEL_TIME, pace <= LEVEL_TIME),
        "80 turns to those of marks": (ratio, FEW_TURNS, ratio <= FEW_TURNS),
        "time a turn of 320 turns to one of 80": (growth, 1.3, growth <= 1.3),
    }


def say(line: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all claims are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=positive, default=200_000, help="rows that are tokenised before")
    parser.add_argument("--stream-rows", type=positive, default=2_000_000, help="rows that are read while training")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds of what is compared")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    given = parser.parse_args(argv)
    found = measure(given.rows, given.stream_rows, given.repeats)
    judged = claims(found)
    command = shlex.join(["python", "-m", "benchmarks.data", *(sys.argv[1:] if argv is None else argv)])
    machine = facts(torch.device("cpu")) | {"rows": given.rows, "stream_rows": given.stream_rows}
    report = {"command": command, "machine": machine, "measured": found}
    report["claims"] = {what: {"measured": value, "met": met} for what, (value, _, met) in judged.items()}
    given.output_dir.mkdir(parents=True, exist_ok=True)
    (given.output_dir / "data.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = ["# Reading rows", "", f"`{command}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| claim | measured | limit | |", "|---|---:|---:|---|"]
    for what, (value, limit, met) in judged.items():
        lines.append(f"| {what} | {value:,.3g} | {limit:g} | {'met' if met else '**missed**'} |")
    lines += ["", "| measured | |", "|---|---|"]
    for name, values in found.items():
        cells = ", ".join(f"{key} {value:,.4g}" for key, value in values.items())
        lines.append(f"| {name} | {cells} |")
    page = "\n".join(lines) + "\n"
    (given.output_dir / "data.md").write_text(page, encoding="utf-8")
    say(page)
    return 0 if all(met for _, _, met in judged.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
