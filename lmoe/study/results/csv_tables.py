"""The numbers of a study as CSV: whole, as study.json has them and under its names; a cell without one is empty."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from lmoe.study.results.result import ArmResult, ComparisonResult, StudyResult, finite

SPREAD = ("estimate", "low", "high", "bootstrap_low", "bootstrap_high", "standard_error", "df", "smallest_effect")
"""Numbers of a comparison, by their names in study.json."""
TESTS = ("difference_p", "equivalence_p")
"""Its p values, Holm-adjusted."""
COMPARED = (*SPREAD, *TESTS, "verdict")
SIZES = ("total_parameters", "active_parameters", "flops_per_token", "reading_share", "steps", "tokens_per_step")
MEASURED = ("seconds_per_step", "peak_memory_mb", "classifier_accuracy")
BASE = "the base, adapters off"
BASELINE, NOT_COMPARED, NOT_JUDGED, FAILED = "baseline", "not compared", "not judged", "failed"
"""What stands in the place of a verdict."""

Cells = list[list[Any]]
"""The heading first."""


def csv_tables(result: StudyResult) -> dict[str, str]:
    """The tables as CSV, by the name of the file."""
    found = {"verdicts.csv": _verdicts(result, result.arms, result.primary)}
    if result.longer:
        found["verdicts_longer.csv"] = _verdicts(result, result.longer_arms, result.longer)
    found["matched.csv"] = _matched(result)
    if result.secondary:
        found["domains.csv"] = _domains(result)
    if any(arm.tries for arm in result.arms):
        found["tuning.csv"] = _tuning(result)
    return {name: as_csv(cells) for name, cells in found.items()}


def without_verdict(result: StudyResult, arm: ArmResult) -> str:
    """What is said of an arm that is beside nothing."""
    if arm.loss is None:
        return FAILED if arm.failed else NOT_JUDGED
    return BASELINE if arm.name == result.baseline else NOT_COMPARED


def _verdicts(result: StudyResult, arms: Sequence[ArmResult], comparisons: Sequence[ComparisonResult]) -> Cells:
    """Each arm beside the baseline."""
    by_arm = {found.arm: found for found in comparisons}
    cells: Cells = [["arm", "title", "seeds", "loss", *COMPARED]]
    for arm in arms:
        found = by_arm.get(arm.name)
        seeds = len(arm.seeds) if found is None else found.seeds
        cells.append([arm.name, arm.title, seeds, arm.loss, *_compared(result, arm, found)])
    if result.base_loss is not None and arms is result.arms:
        cells.append(["", BASE, "", result.base_loss, *[None] * len(COMPARED)])
    return cells


def _domains(result: StudyResult) -> Cells:
    """Each arm in each domain, and the base."""
    by_place = {(found.arm, found.domain): found for found in result.secondary}
    cells: Cells = [["arm", "title", "domain", "in_the_mean", "rows", "seeds", "loss", *COMPARED]]
    rows = {**result.domains, **result.more_domains}
    for arm in result.arms:
        for domain, loss in arm.domain_losses.items():
            found = by_place.get((arm.name, domain))
            seeds = len(arm.seeds) if found is None else found.seeds
            place = [arm.name, arm.title, domain, domain in result.domains, rows.get(domain)]
            cells.append([*place, seeds, loss, *_compared(result, arm, found)])
    for domain, loss in result.base_domain_losses.items():
        place = ["", BASE, domain, domain in result.domains, rows.get(domain)]
        cells.append([*place, "", loss, *[None] * len(COMPARED)])
    return cells


def _compared(result: StudyResult, arm: ArmResult, found: ComparisonResult | None) -> list[Any]:
    if found is None:
        return [*[None] * (len(COMPARED) - 1), without_verdict(result, arm)]
    return [getattr(found, name) for name in COMPARED]


def _matched(result: StudyResult) -> Cells:
    """What each arm has and takes, and a column for each tuned key."""
    keys = _keys(result)
    columns = [*(f"{which} {key}" for key in keys for which in ("chosen", "second", "edge"))]
    cells: Cells = [["arm", "title", *SIZES, *MEASURED, *columns]]
    for arm in result.arms:
        kinds = (arm.chosen or {}, arm.second or {}, arm.edges)
        values = [kind.get(key) for key in keys for kind in kinds]
        cells.append([arm.name, arm.title, *(getattr(arm, name) for name in (*SIZES, *MEASURED)), *values])
    return cells


def _tuning(result: StudyResult) -> Cells:
    """Each try: its values, the mean over the seeds, each seed, and why its runs failed."""
    keys, seeds = _keys(result), [str(seed) for seed in result.tuning_seeds]
    cells: Cells = [["arm", "title", *keys, "chosen", "mean", *(f"seed {seed}" for seed in seeds), "failures"]]
    for arm in result.arms:
        for found in arm.tries:
            values = [found.values.get(key) for key in keys]
            scores = [found.scores.get(seed) for seed in seeds]
            why = "; ".join(f"seed {seed}: {text}" for seed, text in found.failures.items())
            cells.append([arm.name, arm.title, *values, found.values == arm.chosen, found.mean, *scores, why])
    return cells


def _keys(result: StudyResult) -> list[str]:
    """All keys that were tuned, in the order of the arms."""
    return list(dict.fromkeys(key for arm in result.arms for found in arm.tries for key in found.values))


def as_csv(cells: Sequence[Sequence[Any]]) -> str:
    """A table as CSV, the heading first: a number with all its digits, empty where it is none or not finite."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(list(_written(row)) for row in cells)
    return text.getvalue()


def _written(row: Sequence[Any]) -> Iterator[str]:
    """Each cell so that it is read back as what it is: text as it stands, what is neither that nor a number in JSON."""
    for value in map(finite, row):
        if value is None:
            yield ""
        else:
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
