"""The tables of a study as they are read: for the terminal, and as Markdown and LaTeX."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lmoe.report.files import write_bytes
from lmoe.report.markdown import plain
from lmoe.report.wording import NOT_MEASURED, counted, percent
from lmoe.report.wording import memory as memory_text
from lmoe.study.results.answer import judged_often, listed
from lmoe.study.results.csv_tables import BASE, FAILED, csv_tables, without_verdict
from lmoe.study.results.result import ArmResult, ComparisonResult, StudyResult, TryResult

Rows = list[list[str]]
"""The heading first."""
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {character: f"{{{character}}}" for character in "[]*"}
)
"""NOTE behind the end of a row or a rule a bare [ would begin an argument, and a bare * be part of the command."""
P, BOOTSTRAP, COULD_SEE = "p (Holm)", "bootstrap", "could see"
"""Columns: adjusted p value, interval of the bootstrap, and the smallest difference that could have been seen."""
FILES_ALONE = ("seeds", P, BOOTSTRAP, COULD_SEE)
"""Columns that the terminal has no room for."""
NAMED = 3
"""Jobs that a message of failures names."""


@dataclass(slots=True, frozen=True, kw_only=True)
class StudyTable:
    """A table as it is read.

    Args:
        title: its heading.
        rows: the heading of the columns first.
        note: what a reader has to know of it; "": nothing.
    """

    title: str
    rows: Rows
    note: str = ""


def study_tables(result: StudyResult) -> Group:
    """The verdicts, and what is matched, for the terminal."""
    parts: list[RenderableType] = [Text(), Text(result.question or result.name, "bold"), Text()]
    title = f"{measure_text(result)}, less that of {result.baseline}"
    parts.append(rich_table(title, verdict_rows(result, result.primary), without=FILES_ALONE))
    if result.longer:
        title = f"The same with {result.longer_times} times the steps"
        parts += [Text(), rich_table(title, verdict_rows(result, result.longer), without=FILES_ALONE)]
    parts += [Text(), rich_table("What is matched", matched_rows(result), without=("second best",))]
    notes = [pairing_note(result, result.primary), pairing_note(result, result.longer), reading_note(result.arms)]
    parts += [Text(f"note: {note}") for note in notes if note]
    parts += [Text(f"note: {note}") for note in all_notes(result)]
    return Group(*parts)


def write_tables(result: StudyResult, folder: Path) -> list[str]:
    """Write the tables as Markdown, CSV and LaTeX.

    Returns:
        The names of the files.

    Raises:
        TrainingError: a file cannot be written.
    """
    tables = all_tables(result)
    command = f"```sh\n{result.command}\n```"
    markdown = [f"# {plain(result.name)}", plain(result.question), command, plain(head_text(result))]
    for table in tables:
        markdown += [f"## {plain(table.title)}", as_markdown(table.rows), plain(table.note)]
    if notes := all_notes(result):
        markdown += ["## Notes", "\n".join(f"* {plain(note)}" for note in notes)]
    files = {"study.md": "\n\n".join(part for part in markdown if part) + "\n"}
    files |= csv_tables(result)
    files["study.tex"] = "\n".join(as_latex(table.title, table.rows, table.note) for table in tables)
    for name, text in files.items():
        write_bytes(folder / name, text.encode("utf-8"))
    return list(files)


def all_tables(result: StudyResult) -> list[StudyTable]:
    """Each table, in its order."""
    title = f"{measure_text(result)}, beside {result.baseline}"
    tables = [
        StudyTable(title=title, rows=verdict_rows(result, result.primary), note=pairing_note(result, result.primary))
    ]
    if result.longer:
        title = f"With {result.longer_times} times the steps"
        note = pairing_note(result, result.longer)
        tables.append(StudyTable(title=title, rows=verdict_rows(result, result.longer), note=note))
    tables.append(StudyTable(title="What is matched", rows=matched_rows(result), note=reading_note(result.arms)))
    if result.secondary:
        tables.append(StudyTable(title="By domain, secondary", rows=domain_rows(result)))
    if any(arm.tries for arm in result.arms):
        tables.append(StudyTable(title=f"Tuning: {result.metric} of the validation loss", rows=tuning_rows(result)))
    return tables


def verdict_rows(result: StudyResult, comparisons: Sequence[ComparisonResult]) -> Rows:
    """Each arm with its loss, its difference to the baseline, and the verdict; the best first."""
    arms = result.arms if comparisons is result.primary else result.longer_arms
    by_arm = {found.arm: found for found in comparisons}
    rows = [
        ["arm", "loss", "seeds", "difference", f"{level_text(result)} interval", BOOTSTRAP, COULD_SEE, P, "verdict"]
    ]
    judged = sorted((arm for arm in arms if arm.loss is not None), key=lambda arm: arm.loss or 0.0)
    for arm in judged:
        found = by_arm.get(arm.name)
        loss = f"{arm.loss:.4f}"
        if found is None:
            rows.append([arm.title, loss, str(len(arm.seeds)), *[""] * 5, without_verdict(result, arm)])
            continue
        interval = "" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
        bootstrap = "" if found.bootstrap_low is None else f"{found.bootstrap_low:+.4f} to {found.bootstrap_high:+.4f}"
        could_see = "" if found.smallest_effect is None else f"{found.smallest_effect:.2g}"
        p = "" if found.difference_p is None else p_text(found.difference_p)
        numbers = [f"{found.estimate:+.4f}", interval, bootstrap, could_see, p]
        rows.append([arm.title, loss, str(found.seeds), *numbers, found.sentence])
    for arm in arms:
        if arm.loss is None:
            rows.append([arm.title, NOT_MEASURED, "0", *[""] * 5, without_verdict(result, arm)])
    if result.base_loss is not None and arms is result.arms:
        rows.append([BASE, f"{result.base_loss:.4f}", *[""] * 7])
    return rows


def pairing_note(result: StudyResult, comparisons: Sequence[ComparisonResult]) -> str:
    """A note that names the arms whose difference is over fewer seeds than the losses in the same table; "": none."""
    arms = {arm.name: arm for arm in (result.arms if comparisons is result.primary else result.longer_arms)}
    fewer = [
        f"{counted(found.seeds, 'seed')} of {listed([arms[found.arm].title])}"
        for found in comparisons
        if found.seeds < max(len(arms[name].seeds) for name in (found.arm, result.baseline))
    ]
    if not fewer:
        return ""
    said = ", ".join(fewer)
    return f"losses are over all seeds of an arm, differences over those that it shares with the baseline: {said}"


def matched_rows(result: StudyResult) -> Rows:
    """What each arm has and takes, how many prompts its classifier tells, and the values that tuning chose."""
    told = any(arm.classifier_accuracy is not None for arm in result.arms)
    classifier = ["classifier"] if told else []
    rows = [["arm", "parameters", "active", "MFLOP/token", "s/step", "memory", *classifier, "chosen", "second best"]]
    for arm in result.arms:
        accuracy = "" if arm.classifier_accuracy is None else percent(arm.classifier_accuracy)
        rows.append(
            [
                arm.title,
                _millions(arm.total_parameters),
                _millions(arm.active_parameters),
                f"{arm.flops_per_token / 1e6:,.1f}",
                NOT_MEASURED if arm.seconds_per_step is None else f"{arm.seconds_per_step:.3f}",
                NOT_MEASURED if arm.peak_memory_mb is None else memory_text(arm.peak_memory_mb),
                *([accuracy] if told else []),
                _values(arm, arm.chosen),
                _values(arm, arm.second),
            ]
        )
    return rows


def reading_note(arms: Sequence[ArmResult]) -> str:
    """What operations a token lack of arms whose router reads each prompt first; "": there are none."""
    by_share: dict[str, list[str]] = {}
    for arm in arms:
        if arm.reading_share:
            by_share.setdefault(f"{arm.reading_share:.0%}", []).append(arm.title)
    if not by_share:
        return ""
    said = ", ".join(f"{share} more for {listed(titles)}" for share, titles in by_share.items())
    return f"FLOPs leave out that a router reads each prompt first, without gradients: were all tokens prompts, {said}"


def domain_rows(result: StudyResult) -> Rows:
    """The difference of each arm in each domain, with * where one was shown."""
    names = [*result.domains, *result.more_domains]
    rows = [["arm", *(name if name in result.domains else f"({name})" for name in names)]]
    for arm in result.arms:
        own = {found.domain: found for found in result.secondary if found.arm == arm.name}
        if arm.name == result.baseline:
            rows.append(
                [f"{arm.title} (loss)", *(f"{arm.domain_losses.get(name, float('nan')):.4f}" for name in names)]
            )
        elif own:
            shown = [f"{own[name].estimate:+.4f}{'*' * is_decided(result, own[name])}" for name in names]
            rows.append([arm.title, *shown])
    return rows


def tuning_rows(result: StudyResult) -> Rows:
    """Every try of every arm: the mean over the seeds, and each seed."""
    rows = [["arm", "values", "mean", *(f"seed {seed}" for seed in result.tuning_seeds)]]
    for arm in result.arms:
        for found in arm.tries:
            absent = FAILED if found.failures else NOT_MEASURED
            mean = absent if found.mean is None else f"{found.mean:.4f}"
            shown = [_score(found, str(seed)) for seed in result.tuning_seeds]
            rows.append([arm.title, _values(arm, found.values), mean, *shown])
    return rows


def _score(found: TryResult, seed: str) -> str:
    """What a try scored with a seed, or that it failed."""
    if seed in found.failures:
        return FAILED
    return f"{found.scores[seed]:.4f}" if seed in found.scores else NOT_MEASURED


def all_notes(result: StudyResult) -> list[str]:
    """What a reader has to know, how often these rows have judged and what failed included."""
    return [*result.notes, judged_often(result.judged_before), *failures(result)]


def failures(result: StudyResult) -> list[str]:
    """The jobs that failed, and why: those of an arm that failed alike in one text."""
    longer = f"failed with {result.longer_times} times the steps"
    return [
        *(f"failed: {said}" for arm in result.arms for said in _alike(arm.failures)),
        *(f"{longer}: {said}" for arm in result.longer_arms for said in _alike(arm.failures)),
    ]


def _alike(failures: Sequence[str]) -> list[str]:
    """Failures of an arm, a text for each reason.

    Args:
        failures: each the label of a job, `: ` and the reason.
    """
    jobs: dict[str, list[str]] = {}
    for failure in failures:
        job, _, reason = failure.partition(": ")
        jobs.setdefault(reason, []).append(job)
    more = {why: f" and {len(own) - NAMED} more" if len(own) > NAMED else "" for why, own in jobs.items()}
    return [f"{', '.join(own[:NAMED])}{more[why]}: {why}" for why, own in jobs.items()]


def p_text(p: float) -> str:
    """A p value with as many digits as it is worth."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def as_markdown(rows: Rows) -> str:
    """A table in Markdown."""
    escaped = [[plain(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_latex(title: str, rows: Rows, note: str = "") -> str:
    """A table for the package booktabs.

    Args:
        note: stands behind the title.
    """
    caption = f"{title}; {note}" if note else title
    cells = [[" ".join(cell.split()).translate(LATEX) for cell in row] for row in rows]
    lines = [" & ".join(row) + r" \\" for row in cells]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption.translate(LATEX)}}}",
            rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def measure_text(result: StudyResult) -> str:
    """What is compared."""
    return "Loss per label token, mean over domains" if len(result.domains) > 1 else "Loss per label token"


def head_text(result: StudyResult) -> str:
    """What the models were judged on, and how to read the differences."""
    base = "" if result.base_loss is None else f" The base with its adapters off: {result.base_loss:.4f}."
    return (
        f"{counted(result.judging_rows, 'judging row')} of {counted(len(result.domains), 'domain')}, "
        f"{result.judging_tokens:,} label tokens. Differences in nats per label token, below 0 better than "
        f"{result.baseline}; equivalent within {result.margin:g}.{base}"
    )


def level_text(result: StudyResult) -> str:
    """The confidence of the intervals, such as `97.5 %`."""
    return f"{100 * (1 - result.alpha):g} %"


def is_decided(result: StudyResult, found: ComparisonResult) -> bool:
    """Whether a difference was shown, which tables and pictures mark with *."""
    return found.difference_p is not None and found.difference_p < result.alpha


def values_said(values: Mapping[str, object]) -> str:
    """Values that were tried, such as `optim.lr=0.001, injection.lora_alpha=32`."""
    return ", ".join(f"{key}={value_said(value)}" for key, value in values.items())


def value_said(value: object) -> str:
    """A value that was tried, a number with as many digits as it needs."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(arm: ArmResult, values: dict[str, object] | None) -> str:
    if values is None:
        return NOT_MEASURED
    said = values_said(values)
    edge = " (edge)" if values is arm.chosen and arm.edges else ""
    return (said or "as given") + edge


def _millions(count: int) -> str:
    """A number of parameters: `2.45 M`, or all its digits below a hundred thousand."""
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"


def rich_table(title: str, rows: Rows, *, without: Collection[str] = ()) -> Table:
    """A table for the terminal: figures stay whole, words in the first and the last column are folded.

    Args:
        without: headings of columns that only the files have.
    """
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    shown = [number for number, name in enumerate(rows[0]) if name not in without]
    for number in shown:
        words = number in (shown[0], shown[-1])
        table.add_column(
            Text(rows[0][number]), overflow="fold", no_wrap=not words, justify="left" if words else "right"
        )
    for row in rows[1:]:
        table.add_row(*(Text(row[number]) for number in shown))
    return table
