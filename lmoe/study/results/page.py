"""study.html: all that a study has found on one page, which opens from disk and loads nothing."""

from dataclasses import dataclass
from pathlib import Path

from lmoe.report.files import write_bytes
from lmoe.report.html import render
from lmoe.study.results.answer import answer, judged_often
from lmoe.study.results.difference_pictures import difference_picture, domain_picture
from lmoe.study.results.pictures import Picture
from lmoe.study.results.result import ArmResult, StudyResult
from lmoe.study.results.tables import StudyTable, all_tables, failures, measure_text
from lmoe.study.results.training_picture import training_picture
from lmoe.study.results.tuning_picture import tuning_pictures

PAGE_FILE = "study.html"
NUMBER_STARTS = "+-<0123456789."
"""What a cell of a column of numbers begins with."""

MOST_ROWS = 25
"""Of a table that is open from the start."""


@dataclass(slots=True, frozen=True)
class PageTable:
    """A table for the page.

    Args:
        title: its heading.
        head: of the columns.
        rows: cells as text.
        wide: columns of text, which wrap; others hold numbers.
        note: what stands below it; "": nothing.
        folded: whether it is opened by a click.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    wide: set[int]
    note: str
    folded: bool


def write_page(result: StudyResult, folder: Path) -> str:
    """Write the page of a study.

    Returns:
        The name of the file.

    Raises:
        TrainingError: it cannot be written.
    """
    return write_bytes(folder / PAGE_FILE, study_page(result).encode("utf-8")).name


def study_page(result: StudyResult) -> str:
    """The page as HTML: answer, differences, tables, tuning, training, domains, commands, failures, notes."""
    measure = f"{measure_text(result)}, less that of the baseline"
    times = f"with {result.longer_times} times the steps"
    differences = [
        difference_picture(result, result.primary, measure),
        difference_picture(result, result.longer, f"The same {times}"),
    ]
    training = [
        training_picture(result, result.arms, "Training loss"),
        training_picture(result, result.longer_arms, f"Training loss {times}"),
    ]
    return render(
        "study.html.jinja",
        title=f"Study {result.name}",
        question=result.question,
        answer=answer(result),
        settings=_settings(result),
        differences=_there(differences),
        tables=[_table(table) for table in all_tables(result)],
        pictures=_there([*tuning_pictures(result), *training, domain_picture(result)]),
        commands=[(arm.title, arm.commands) for arm in result.arms if arm.commands],
        every_command=result.commands,
        failures=failures(result),
        notes=result.notes,
    )


def _there(pictures: list[Picture | None]) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _settings(result: StudyResult) -> dict[str, str]:
    """What was done, where and when, by what it is."""
    domains = ", ".join(f"{name} {rows:,}" for name, rows in result.domains.items())
    models = ", ".join(f"{name} {count:,}" for name, count in result.judged_before.items())
    tuned = ", ".join(map(str, result.tuning_seeds))
    alpha = f"{100 * result.alpha:g} %"
    found = {
        "command": result.command,
        "baseline": result.arm(result.baseline).title,
        "judging rows": f"{result.judging_rows:,} with {result.judging_tokens:,} label tokens: {domains}",
        "these rows": f"{judged_often(result.judged_before)}: {models}",
        "seeds": f"judged with {_judged_with(result.arms)}; {f'tuned with {tuned}' if tuned else 'nothing was tuned'}",
        "margin": f"{result.margin:g} nats per label token; {alpha} false alarms in each family of comparisons",
        "machine": result.machine,
        "finished": result.finished,
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None),
    }
    return {name: value for name, value in found.items() if value}


def _judged_with(arms: list[ArmResult]) -> str:
    """The seeds of the baseline, or of the first arm that has any."""
    seeds = next((arm.seeds for arm in arms if arm.seeds), [])
    return ", ".join(map(str, seeds)) or "none"


def _table(table: StudyTable) -> PageTable:
    head, *body = table.rows
    wide = {i for i in range(len(head)) if i == 0 or any(row[i] and row[i][0] not in NUMBER_STARTS for row in body)}
    return PageTable(table.title, head, body, wide, table.note, len(body) > MOST_ROWS)
