"""Whether the statistics of a study keep what they promise, on thousands of simulated studies: `make bench-statistics`.

Every cell is a number of seeds, a size of the noise of seeds and of the rest, and rows of one kind. The rules that were
tried for the critical value stand beside the one that is used.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.critical_values import RULES, extremes
from benchmarks.flags import RESULTS, positive
from benchmarks.machine import facts, versions
from benchmarks.simulated_studies import (
    ARMS,
    DESIGNS,
    Design,
    Noise,
    bootstrap_share,
    bounds,
    family_share,
    selection,
    share,
)

SEEDS = (3, 5, 10)
SEED_NOISE = (0.0, 1.0, 3.0)
REST = (0.5, 1.0, 2.0)
LEVELS = (0.05, 0.01, 0.05 / ARMS)
BOOTSTRAP_STUDIES, BOOTSTRAP_DRAWS = 500, 500
SELECTION_SEEDS = 3
NAMES = {
    "false_alarms": "false alarms",
    "covered": "coverage",
    "found": "stated effect found",
    "found_planned": "found, noise known",
    "false_equivalence": "false equivalence",
    "student": "false alarms, t",
    "family": f"false alarms of {ARMS} arms",
}


MOST_BIAS, LEAST_SHOWN = 0.1, 0.5
"""Standard errors: bias left by choosing on other rows and seeds; bias that choosing on the judging rows must show."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Cell:
    """Shares of simulated studies by name."""

    design: str
    seeds: int
    noise: Noise
    shares: dict[str, float]

    def broken(self) -> list[str]:
        """Each share outside its bound, in words."""
        limits = bounds(self.seeds)
        where = f"{self.seeds} seeds, seed noise {self.noise.seed:g}, rest {self.noise.rest:g}, {self.design}"
        return [
            f"{NAMES[name]} {value:.1%}, allowed {limits[name].least:.1%} to {limits[name].most:.1%}: {where}"
            for name, value in self.shares.items()
            if name in limits and not limits[name].holds(value)
        ]


def measure(designs: Sequence[Design], studies: int, generator: np.random.Generator) -> list[Cell]:
    """All cells; families of arms where the rest is as large as the row effects."""
    cells = []
    for design in designs:
        for rest in REST:
            for seeds in SEEDS:
                for seed_noise in SEED_NOISE:
                    noise = Noise(seed=seed_noise, rest=rest)
                    shares = share(design, noise, seeds, studies, generator)
                    if rest == 1:
                        shares["family"] = family_share(design, noise, seeds, studies, generator)
                    cells.append(Cell(design=design.name, seeds=seeds, noise=noise, shares=shares))
                    shown = ", ".join(f"{NAMES[name]} {value:.1%}" for name, value in shares.items())
                    sys.stdout.write(f"{design.name}, {seeds} seeds, {noise.seed:g}, {noise.rest:g}: {shown}\n")
                    sys.stdout.flush()
    return cells


def as_markdown(report: dict[str, Any], cells: Sequence[Cell]) -> str:
    """Returns a page with the promises, a table for each kind of rows, and the rules that were tried."""
    lines = ["# Whether the statistics of a study keep what they promise", "", f"`{report['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["machine"].items()), ""]
    lines += [
        "Seed noise: standard deviation of the seed part of an estimate over that of its row part. Rest: that of the",
        "rest over that of the row effects, on one row with one seed. Shares in %; `t` is Student's t with",
        "Satterthwaite's degrees of freedom and a negative seed part cut off. A stated effect is what each study says",
        "itself that it could have seen with power 80 %; with the noise known it is what a study says that knows the",
        "variances.",
        "",
    ]
    lines += ["## Promises", "", *(f"- broken: {text}" for text in report["broken"])]
    lines += [] if report["broken"] else [f"All kept, in {len(cells)} cells of {report['studies']} studies."]
    for design in dict.fromkeys(cell.design for cell in cells):
        lines += ["", f"## {design}", "", f"| seeds | seed noise | rest | {' | '.join(NAMES.values())} |"]
        lines += ["|---:" * (3 + len(NAMES)) + "|"]
        for cell in cells:
            if cell.design == design:
                values = [f"{100 * cell.shares[n]:.1f}" if n in cell.shares else "" for n in NAMES]
                lines.append(f"| {cell.seeds} | {cell.noise.seed:g} | {cell.noise.rest:g} | {' | '.join(values)} |")
    lines += ["", "## Choosing the best of 20 equal learning rates", ""]
    lines += [
        "| seed noise | chosen on | bias in standard errors | called better, % (2.5 is right) |",
        "|---:|---|---:|---:|",
    ]
    for row in report["selection"]:
        lines.append(f"| {row['seed_noise']:g} | {row['chosen_on']} | {row['bias']:.2f} | {100 * row['better']:.1f} |")
    lines += ["", f"## The bootstrap beside it ({BOOTSTRAP_STUDIES} studies, false alarms in %)", ""]
    lines += ["| seeds | seed noise | rows | bootstrap |", "|---:|---:|---|---:|"]
    for row in report["bootstrap"]:
        lines.append(f"| {row['seeds']} | {row['seed_noise']:g} | {row['design']} | {100 * row['missed']:.1f} |")
    lines += ["", "## Rules for the critical value that were tried", ""]
    lines += ["Least and most false alarms over all shares of the seeds, in %, many rows, without simulation.", ""]
    columns = [(seeds, alpha) for alpha in LEVELS for seeds in SEEDS]
    heads = [f"{seeds} seeds at {100 * alpha:.2g} %" for seeds, alpha in columns]
    lines += [f"| rule | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for name, values in report["rules"].items():
        cells_of_rule = [f"{100 * least:.2f} to {100 * most:.2f}" for least, most in values]
        lines.append(f"| {name} | {' | '.join(cells_of_rule)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all promises are kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--studies", type=positive, default=10_000, help="simulated studies of each cell")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    given = parser.parse_args(argv)
    started, generator = time.perf_counter(), np.random.default_rng(given.seed)

    rules = {
        name: [extremes(rule, seeds - 1, alpha) for alpha in LEVELS for seeds in SEEDS] for name, rule in RULES.items()
    }
    cells = measure(DESIGNS, given.studies, generator)
    broken = [text for cell in cells for text in cell.broken()]
    chosen = []
    for seed_noise in SEED_NOISE:
        found = selection(DESIGNS[2], Noise(seed=seed_noise), SELECTION_SEEDS, given.studies, generator)
        chosen += [{"seed_noise": seed_noise, "chosen_on": where, **asdict(s)} for where, s in found.items()]
        if abs(found["other rows and seeds"].bias) > MOST_BIAS:
            broken.append(f"choosing on other rows and seeds is biased, seed noise {seed_noise:g}")
        if found["judging rows"].bias > -LEAST_SHOWN:
            broken.append(f"choosing on the judging rows shows no bias, seed noise {seed_noise:g}")
    resampled = []
    for design in (DESIGNS[0], DESIGNS[2]):
        for seeds in SEEDS:
            for seed_noise in SEED_NOISE:
                studies = min(given.studies, BOOTSTRAP_STUDIES)
                missed = bootstrap_share(design, Noise(seed=seed_noise), seeds, studies, BOOTSTRAP_DRAWS, generator)
                resampled.append({"design": design.name, "seeds": seeds, "seed_noise": seed_noise, "missed": missed})
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.statistics", *(sys.argv[1:] if argv is None else argv)]),
        "machine": facts(torch.device("cpu")) | versions(("numpy", "scipy")),
        "studies": given.studies,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "broken": broken,
        "cells": [asdict(cell) for cell in cells],
        "selection": chosen,
        "bootstrap": resampled,
        "rules": rules,
    }
    given.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (given.output_dir / "statistics.json").write_text(text + "\n", encoding="utf-8")
    (given.output_dir / "statistics.md").write_text(as_markdown(report, cells), encoding="utf-8")
    for line in broken or ["all promises kept"]:
        sys.stdout.write(f"  {line}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
