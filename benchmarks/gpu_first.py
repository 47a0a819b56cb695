"""What a GPU must show first, in a quarter of an hour: `make gpu`.

Ten parts, each in a process of its own with a limit of its time, so that a failure stops no other. Without a GPU they
run on the CPU with tiny sizes, which shows that they run, and no more. Needs no network.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu_parts.part import Findings, Place
from lmoe.ops.card_rules import RULES_FILE, CardRule, read_rules, write_rules

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "lightning", "peft", "bitsandbytes", "triton", "lmoe")


@dataclass(slots=True, frozen=True)
class Part:
    """One of the ten.

    Args:
        what: it shows.
        function: its module in benchmarks/gpu_parts, and its name there.
        seconds: after which its process is ended.
    """

    what: str
    function: tuple[str, str]
    seconds: int


SITE_TIMES = 7
"""The part that measures what moe.backend=auto should take."""
PARTS = {
    1: Part("all modules import; names that other versions lack", ("imports", "imports"), 60),
    2: Part("stacked, grouped and triton against float64", ("kernels", "agreement"), 60),
    3: Part("no step waits for the device", ("steps", "host_syncs"), 45),
    4: Part("launches, the attention that ran, memory with and without a mask", ("steps", "launches"), 75),
    5: Part("same seed, same bytes; resumed; checkpointing and precisions", ("runs", "same_bytes"), 120),
    6: Part("ddp and fsdp2 with one device", ("runs", "one_device"), 60),
    SITE_TIMES: Part("times of a site by E * R and k", ("kernels", "site_times"), 180),
    8: Part("an 8 B beside PEFT and beside its estimate", ("steps", "eight_b"), 90),
    9: Part("nf4 and int8, compile, static cache", ("products", "products"), 150),
    10: Part("decoding four experts at 4 B, compiled", ("products", "decoding"), 360),
}


def run_here(number: int, device: torch.device) -> dict[str, Any]:
    """Run a part in this process; its result, whatever happens."""
    part, start = PARTS[number], time.perf_counter()
    module, name = part.function
    with TemporaryDirectory() as folder:
        try:
            function: Callable[[Place], Findings]
            function = getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), name)
            found = function(Place(device=device, folder=Path(folder)))
        except Exception as error:  # a part that fails is a result
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).splitlines() or [""])[0]
            where = f"{Path(last.filename).name}:{last.lineno}"
            found = Findings(problems=[f"{type(error).__name__} at {where}: {text}"])
    return _result(number, found, time.perf_counter() - start)


def run_apart(number: int, device: torch.device) -> dict[str, Any]:
    """Run a part in a process of its own: an error of CUDA spoils all that follows in its process."""
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        words = ["--part", str(number), "--device", str(device), "--here", "--json", str(file)]
        command = [sys.executable, "-m", "benchmarks.gpu_first", *words]
        limit = PARTS[number].seconds
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return _result(number, Findings(problems=[f"not done after {limit} s"]), time.perf_counter() - start)
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))["parts"][0]
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        problem = f"the process ended with {done.returncode}: {last}"
        return _result(number, Findings(problems=[problem]), time.perf_counter() - start)


def _result(number: int, found: Findings, seconds: float) -> dict[str, Any]:
    return {
        "part": number,
        "what": PARTS[number].what,
        "verdict": "FAIL" if found.problems else "PASS",
        "seconds": round(seconds, 1),
        "problems": found.problems,
        "figures": found.figures,
    }


def versions(device: torch.device) -> dict[str, Any]:
    """Versions of everything that matters, with the card."""
    facts: dict[str, Any] = dict(machine.facts(device))
    facts |= machine.versions(PACKAGES)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts |= {"capability": str(torch.cuda.get_device_capability()), "memory GB": round(total / 1e9, 1)}
        facts["free GB"] = round(free / 1e9, 1)
    return facts


def as_markdown(report: dict[str, Any]) -> str:
    """A page: the verdicts, then the figures of each part."""
    lines = [f"# First on {report['device']}", "", "`make gpu`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["versions"].items()), ""]
    lines += ["| part | what | verdict | seconds |", "|---:|---|---|---:|"]
    for part in report["parts"]:
        lines.append(f"| {part['part']} | {part['what']} | {part['verdict']} | {part['seconds']} |")
    for part in report["parts"]:
        lines += ["", f"## {part['part']}. {part['what']}", "", *(f"- FAIL: {text}" for text in part["problems"])]
        figures = dict(part["figures"])
        rows = figures.pop("table", [])
        lines += [f"- {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in figures.items()]
        if rows:
            heads = list(rows[0])
            lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            lines += [f"| {' | '.join(str(row.get(head, '')) for head in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Flags of the command, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, choices=PARTS, action="append", help="only these; default: all ten")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--here", action="store_true", help="in this process, without limits of time")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--json", type=Path, help="write this file only")
    parser.add_argument(
        "--write-rules",
        type=Path,
        nargs="?",
        const=RULES_FILE,
        metavar="FILE",
        help="write what part 7 has measured into the table of moe.backend=auto; default: lmoe/ops/card_rules.json",
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0 if every part passed."""
    flags = arguments(given)
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {"device": str(device), "versions": versions(device), "parts": []}
    if flags.json is None:
        print(", ".join(f"{name} {value}" for name, value in report["versions"].items()), flush=True)
    for number in flags.part or PARTS:
        result = (run_here if flags.here else run_apart)(number, device)
        report["parts"].append(result)
        if flags.json is None:
            print(f"{result['verdict']} {number} {result['what']} ({result['seconds']} s)", flush=True)
            for problem in result["problems"]:
                print(f"     {problem}", flush=True)
            report_to(report, flags.output_dir)  # after each part: what is known stays, whatever the next one does
    if flags.write_rules is not None:
        write_card_rule(report, device, flags.write_rules)
    if flags.json is not None:
        flags.json.write_text(json.dumps(report), encoding="utf-8")
    return int(any(part["verdict"] == "FAIL" for part in report["parts"]))


def write_card_rule(report: dict[str, Any], device: torch.device, file: Path) -> None:
    """Put the rule of this card that part 7 has measured into the table of `moe.backend=auto`, if it has passed."""
    part = next((part for part in report["parts"] if part["part"] == SITE_TIMES and part["verdict"] == "PASS"), None)
    if part is None:
        print(f"no rule written: part {SITE_TIMES} has not passed", flush=True)
        return
    cuda, figures, said = device.type == "cuda", part["figures"], report["versions"]
    pairs = {int(k): None if start is None else (start, 0) for k, start in figures["break-even of E*R by k"].items()}
    width, out = figures["D, O"]
    where = f"{figures['tokens of the rule']} tokens, {width} -> {out}, torch {said['torch']}"
    rule = CardRule(
        card=torch.cuda.get_device_name(device) if cuda else "CPU",
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if cuda else None,
        dtype=figures["type"].removeprefix("torch."),
        break_even=pairs,
        measured=True,
        how=f"make gpu, part {SITE_TIMES}, {said['date']}: {where}",
    )
    write_rules([*read_rules(file if file.exists() else RULES_FILE), rule], file)
    print(f"{file}: {rule.card}, {rule.dtype}, grouped from E*R by k: {figures['break-even of E*R by k']}", flush=True)


def report_to(report: dict[str, Any], folder: Path) -> None:
    """Write gpu_first_DEVICE.json and gpu_first_DEVICE.md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu_first_{torch.device(report['device']).type}"
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (folder / f"{stem}.json").write_text(text, encoding="utf-8")
    (folder / f"{stem}.md").write_text(as_markdown(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
