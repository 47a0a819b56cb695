"""The tables of a comparison of runs, as the terminal shows them."""

from dataclasses import asdict
from io import StringIO

from rich.console import Console

from lmoe.statistics.verdict import Verdict
from lmoe.study.results.runs_result import RunsArm, RunsComparison, RunsResult
from tests.study.made_results import HALF, comparison

UNDECIDED = "cannot be told: a difference of 0.02 could have been seen (with probability 0.8, taken alone)"


def shown(*primary: RunsComparison, width: int = 80) -> str:
    """The tables of arms beside a baseline, in so many columns."""
    names = ["base", *(found.arm for found in primary)]
    arms = [
        RunsArm(
            name=name, differs={}, runs=[name], seeds=[0, 1, 2], losses=[2.0] * 3, loss=2.0, domain_losses={"a": 2.0}
        )
        for name in names
    ]
    found = RunsResult(
        data="judge", rows=9, tokens=99, digest="0", left_out=0, judged_before={}, domains={"a": 9}, baseline="base",
        margin=0.01, alpha=0.05, arms=arms, primary=list(primary), by_domain=[], notes=[],
    )  # fmt: skip
    console = Console(width=width, file=StringIO(), record=True)
    console.print(found.tables(by_domain=False))
    return console.export_text()


def beside(name: str, verdict: Verdict, sentence: str) -> RunsComparison:
    return RunsComparison(**asdict(comparison(name, -0.01, verdict, sentence=sentence)), rows_low=-0.02, rows_high=0.0)


def test_what_could_have_been_seen_stands_in_a_column_where_something_cannot_be_told():
    text = shown(beside("unsure", Verdict.UNDECIDED, UNDECIDED), beside("good", Verdict.BETTER, "better"), width=100)
    assert "could see" in text and "could have been seen" not in text
    line = next(line for line in text.splitlines() if line.startswith("unsure"))
    assert f"{HALF:.2g}" in line and line.rstrip().endswith("cannot be told")
    assert "could see" not in shown(beside("good", Verdict.BETTER, "better"))
