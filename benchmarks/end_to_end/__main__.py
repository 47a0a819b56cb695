"""What a user would pick instead, whole: `make bench-end-to-end`.

The same rows, base, ranks, steps and precision through `lmoe train` (a single LoRA, a mixture) and through TRL's
SFTTrainer with PEFT, each run in a process of its own, in turns; with rows one by one (padded) and packed. TRL's
packing lets rows see one another where flash attention is missing, as on a CPU; lmoe keeps them apart. lmoe also
measures its validation rows before and after, and writes its report: that counts in the seconds of the whole, not in
the tokens a second. The tools draw rows in orders of their own, so that losses of a few steps are not comparable.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.end_to_end.job import ROOT, Measured, Setting, run_lmoe, run_trl
from benchmarks.flags import RESULTS, positive
from lmoe.files.resources import REAL_BASE, missing_base, named_base
from tests.public_packages import importable

RANK, EXPERTS = 16, 8
"""Of an expert, and how many; two of them are chosen for a token."""
ATTENTION = ["injection.attn_lora.lora_r=32", "injection.attn_lora.lora_alpha=64"]
LMOE = {
    "lmoe, LoRA of rank 32": ["injection=dense_lora", "injection.lora_r=32", "injection.lora_alpha=64", *ATTENTION],
    "lmoe, 8 experts of rank 16": [
        "injection=mixture_lora",
        "moe=top_k",
        f"injection.num_experts={EXPERTS}",
        *ATTENTION,
    ],
}
HOW_TO_READ = [
    "Medians; tokens a second are real ones (no padding), from the end of the first step on; a ratio is the",
    "median over the rounds of the ratio within one. Memory is the largest resident size of the process.",
    "The last losses only show that all of them learn: each draws the rows in an order of its own, lmoe raises the",
    "learning rate over ten steps, and on a CPU TRL's packed rows see one another, which makes them easier to tell.",
]
TRL = {"TRL + PEFT, rank 32": 32, "TRL + PEFT, rank 128": EXPERTS * RANK}
CLAIMS = {
    "lmoe, LoRA of rank 32": ("TRL + PEFT, rank 32", 1.6),
    "lmoe, 8 experts of rank 16": ("TRL + PEFT, rank 128", 1.4),
}
"""Whose tokens a second are to be how many times whose."""
BASES = {"tiny": "tiny", "real": REAL_BASE}
"""Names that lmoe has for them."""


def write_rows(folder: Path) -> Path:
    """The bundled training rows as prompt and completion, which both tools read alike."""
    lines = []
    for file in sorted((ROOT / "data" / "sft" / "train").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            lines.append(json.dumps({"prompt": messages[:-1], "completion": messages[-1:]}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def measure(setting: Setting, repeats: int, threads: int, packages: Path) -> dict[str, list[Measured]]:
    """Every contestant once a round, each round beginning one further on."""
    names, found = [*TRL, *LMOE], {name: [] for name in [*TRL, *LMOE]}
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            with tempfile.TemporaryDirectory() as folder:
                if name in TRL:
                    one = run_trl(TRL[name], setting, Path(folder), threads, packages)
                else:
                    one = run_lmoe(LMOE[name], setting, Path(folder), threads)
            sys.stderr.write(
                f"  {number + 1}/{repeats} {name}: {one.tokens_per_second:.0f} tokens/s, {one.seconds:.0f} s\n"
            )
            found[name].append(one)
    return found


def ratio(mine: Sequence[Measured], theirs: Sequence[Measured]) -> float:
    """Median over the rounds of the tokens a second of one to those of the other."""
    pairs = zip(mine, theirs, strict=True)
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)


def kept(runs: dict[str, list[Measured]]) -> bool:
    """Whether every ratio is what it is to be."""
    return all(ratio(runs[name], runs[other]) >= least for name, (other, least) in CLAIMS.items())


def as_markdown(found: dict[str, dict[str, list[Measured]]], command: str, facts: dict[str, str | int]) -> str:
    """A table for each setting; medians over the rounds."""
    lines = ["# The same rows through lmoe and through TRL with PEFT", "", f"`{command}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += HOW_TO_READ
    for title, runs in found.items():
        heads = ["tokens/s", "s a step", "to the first step, s", "whole process, s", "peak, MB", "last losses"]
        lines += ["", f"## {title}", "", f"| contestant | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
        for name, samples in runs.items():
            middle = {key: statistics.median(asdict(one)[key] for one in samples) for key in asdict(samples[0])}
            cells = [
                f"{middle['tokens_per_second']:,.0f}",
                f"{middle['step_seconds']:.3f}",
                f"{middle['first_step_seconds']:.1f}",
                f"{middle['seconds']:.1f}",
                f"{middle['peak_mb']:,.0f}",
                f"{middle['loss']:.3f}",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        for name, (other, least) in CLAIMS.items():
            value = ratio(runs[name], runs[other])
            lines.append(f"{name} to {other}: {value:.2f}, asked {least} ({'met' if value >= least else 'missed'}).")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every ratio is what it is to be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--base", choices=BASES, default="tiny")
    parser.add_argument("--steps", type=positive, default=30, help="optimizer steps of each run, at least 2")
    parser.add_argument("--repeats", type=positive, default=2, help="rounds")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--packing", choices=["on", "off", "both"], default="both")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    given = parser.parse_args(argv)
    if given.steps < 2:
        parser.error("--steps must be at least 2: the first one is not counted")
    base = BASES[given.base]
    if (missing := missing_base(base)) is not None:
        parser.error(missing)
    base_folder = named_base(base)
    assert base_folder is not None
    facts = machine.facts(torch.device("cpu")) | machine.versions(["lightning"]) | {"threads": given.threads}
    found: dict[str, dict[str, list[Measured]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        packages = importable("trl", Path(folder))
        facts["trl"] = next(path.name.split("-")[1] for path in packages.glob("trl-*")).removesuffix(".dist")
        rows = write_rows(Path(folder))
        for packing in {"on": [True], "off": [False], "both": [False, True]}[given.packing]:
            setting = Setting(
                base=base,
                base_folder=base_folder,
                precision="float32" if given.base == "tiny" else "bfloat16",
                rows=rows,
                steps=given.steps,
                batch_size=5 if packing else 16,
                max_length=384,
                packing=packing,
            )
            title = f"{given.base} base, " + ("packed: 5 x 384 tokens" if packing else "padded: 16 rows") + " a step"
            sys.stderr.write(f"{title}\n")
            found[title] = measure(setting, given.repeats, given.threads, packages)
    command = shlex.join(["python", "-m", "benchmarks.end_to_end", *(sys.argv[1:] if argv is None else argv)])
    page = as_markdown(found, command, facts)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    stem = given.output_dir / f"end_to_end_{given.base}"
    report = {
        "command": command,
        "machine": facts,
        "runs": {
            title: {name: [asdict(one) for one in samples] for name, samples in runs.items()}
            for title, runs in found.items()
        },
    }
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
    sys.stdout.write(f"{page}\n")
    kept = [
        ratio(runs[name], runs[other]) >= least for runs in found.values() for name, (other, least) in CLAIMS.items()
    ]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
