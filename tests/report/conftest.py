"""A small run that never happened: three domains, two layers, four experts."""

import math

import pytest

from lmoe.report.curves import Curves
from lmoe.report.summary import RunSummary

DOMAINS = ["code", "math", "sql"]
SITES = [f"model.layers.{layer}.mlp.{kind}" for layer in range(2) for kind in ("gate_proj", "up_proj", "down_proj")]


@pytest.fixture
def summary() -> RunSummary:
    tilt = {"code": 0.05, "math": 0.0, "sql": -0.05}
    return RunSummary(
        name="tiny run",
        run_dir="outputs/sft/tiny/2025-01-02_03-04-05",
        domains=list(DOMAINS),
        before={"code": 4.0, "math": 5.0, "sql": 6.0},
        after={"code": 3.0, "math": 4.5, "sql": 6.25},
        site_load={site: [0.4, 0.3, 0.2, 0.1] for site in SITES},
        domain_load={d: {site: [0.4 + tilt[d], 0.3 - tilt[d], 0.2, 0.1] for site in SITES} for d in DOMAINS},
        coactivation={
            site: [[1.0, 0.75, 0.125, 0.125], [1.0, 1.0, 0.0, 0.0], [0.25, 0.0, 1.0, 0.5], [0.5, 0.0, 1.0, 1.0]]
            for site in SITES
        },
        knock_out={f"all sites/{e}": {d: 0.01 * e * (i - 1) for i, d in enumerate(DOMAINS)} for e in range(4)},
        specialisation={"all sites/0": None} | dict.fromkeys([f"all sites/{e}" for e in (1, 2, 3)], "sql"),
        phases={"router_warmup": 0, "experts": 15},
        max_steps=150,
        seconds=140.4,
        peak_memory_mb=1312.0,
        trainable_parameters=1_234_567,
        backbone="data/tiny",
        collapsed=[],
    )


@pytest.fixture
def metrics() -> Curves:
    curves: Curves = {"train/loss": [(step, 3 + 2 * math.exp(-step / 40)) for step in range(1, 151)]}
    for i, domain in enumerate(DOMAINS):
        curves[f"val/{domain}/loss"] = [(0, 5.0 + i), (75, 4.0 + i), (150, 3.5 + i)]
    curves["val/loss"] = [(0, 6.0), (75, 5.0), (150, 4.5)]
    curves["routing/entropy"] = [(1, 1.375), (150, 1.125)]
    curves["routing/dead"] = [(1, 0.0), (150, 2.0)]
    return curves
