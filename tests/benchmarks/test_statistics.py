"""The benchmark of the statistics names what is broken, and its stored figures keep all promises."""

import json

from benchmarks.flags import RESULTS
from benchmarks.simulated_studies import DESIGNS, Noise
from benchmarks.statistics import REST, SEED_NOISE, SEEDS, Cell


def test_a_share_outside_its_bound_is_named_with_its_cell():
    cell = Cell(
        design="rows", seeds=3, noise=Noise(seed=1, rest=2), shares={"covered": 0.925, "found": 0.7, "student": 1}
    )
    assert cell.broken() == ["stated effect found 70.0%, allowed 76.0% to 84.0%: 3 seeds, seed noise 1, rest 2, rows"]
    cell = Cell(design="rows", seeds=5, noise=Noise(seed=1), shares={"covered": 0.925, "family": 0.065})
    assert [text.split(",")[0] for text in cell.broken()] == ["coverage 92.5%"]


def test_the_stored_figures_keep_all_promises_in_every_cell():
    report = json.loads((RESULTS / "statistics.json").read_text(encoding="utf-8"))
    assert len(report["cells"]) == len(DESIGNS) * len(SEEDS) * len(SEED_NOISE) * len(REST) and report["studies"] >= 4000
    for stored in report["cells"]:
        cell = Cell(
            design=stored["design"], seeds=stored["seeds"], noise=Noise(**stored["noise"]), shares=stored["shares"]
        )
        assert cell.broken() == []
