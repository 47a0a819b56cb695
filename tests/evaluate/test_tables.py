"""Tables of an evaluation: what users call their domains, phases and tasks is text, not markup of the terminal."""

from dataclasses import fields
from io import StringIO
from itertools import pairwise
from typing import Any

from rich.console import Console

from lmoe.evaluate.results import MEAN, DomainLosses, Evaluation, PreferenceFigures, Sample, TaskScore
from lmoe.evaluate.tables import evaluation_tables


def printed(**parts: Any) -> str:
    file = StringIO()
    Console(file=file, width=120).print(evaluation_tables(Evaluation(settings={}, **parts)))
    return file.getvalue()


def losses_of(domain: str) -> DomainLosses:
    return DomainLosses(domain=domain, label_tokens=1, off_loss=1, on_loss=1, off_perplexity=1, on_perplexity=1)


def test_brackets_in_names_stay_brackets() -> None:
    figures: dict[str, Any] = dict.fromkeys((field.name for field in fields(PreferenceFigures)), 1)
    text = printed(
        samples=[Sample(domain=name, prompt="p", reference="r", off="x", on="y") for name in ("[/b]", "[red]math")],
        preferences=[PreferenceFigures(**figures | {"lesson": "dpo [/b]", "domain": "[red]code"})],
        tasks=[TaskScore(task="[red]quiz", metric="acc,[/b]", off=1, off_stderr=None, on=1, on_stderr=None)],
    )
    for words in ("Sample: [/b]", "Sample: [red]math", "[red]code", "[red]quiz", "acc,[/b]"):
        assert words in text
    assert text.count("Preferences by dpo [/b]: ") == 2


def test_a_line_parts_sums_from_domains_and_none_from_a_domain_in_brackets() -> None:
    rows = [losses_of(name) for name in ("(old)", "code", MEAN)]
    lines = printed(losses=rows).splitlines()
    parted = [before.split()[1] for before, line in pairwise(lines) if line.startswith("├")]
    assert parted == ["code"]
