"""Tables of an evaluation for the terminal; 80 columns for a task or domain of usual length."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lmoe.evaluate.results import SUMS, DomainLosses, Evaluation, PreferenceFigures, Sample
from lmoe.report.table import target_table

OfDomain = TypeVar("OfDomain", DomainLosses, PreferenceFigures)
SHOWN = 400
"""Characters of a prompt or answer that the terminal shows; the files have all of it."""


def evaluation_tables(evaluation: Evaluation) -> Group:
    """Everything that was measured, the notes last."""
    parts: list[RenderableType] = []
    if evaluation.losses:
        parts += [Text(), _losses(evaluation)]
    for lesson in dict.fromkeys(row.lesson for row in evaluation.preferences):
        rows = [row for row in evaluation.preferences if row.lesson == lesson]
        parts += [Text(), _preferences(lesson, rows), Text(), _accuracies(lesson, rows)]
    if evaluation.exported:
        parts += [Text(), _exported(evaluation)]
    if evaluation.targets is not None:
        parts += [Text(), target_table(evaluation.targets)]
    if evaluation.choices:
        parts += [Text(), _choices(evaluation)]
    if evaluation.tasks:
        parts += [Text(), _tasks(evaluation)]
    for sample in evaluation.samples:
        parts += [Text(), _sample(sample)]
    if evaluation.notes:
        parts += [Text(), *(Text(f"note: {note}") for note in evaluation.notes)]
    return Group(*parts)


def _losses(evaluation: Evaluation) -> Table:
    table = _table(
        "Loss (nats per label token) and perplexity, adapters off and on",
        "domain",
        ("tokens", "loss off", "on", "change", "perpl. off", "on"),
    )
    for row in _with_section(table, evaluation.losses):
        change = row.on_loss - row.off_loss
        table.add_row(
            Text(row.domain, overflow="fold"),
            f"{row.label_tokens:,}",
            f"{row.off_loss:.3f}",
            f"{row.on_loss:.3f}",
            Text(f"{change:+.3f}", "green" if change < 0 else "red" if change > 0 else ""),
            f"{row.off_perplexity:,.2f}",
            f"{row.on_perplexity:,.2f}",
        )
    return table


def _preferences(lesson: str, rows: Sequence[PreferenceFigures]) -> Table:
    table = _table(
        f"Preferences by {lesson}: loss and margin of rewards",
        "domain",
        ("n", "loss off", "on", "margin off", "on"),
    )
    for row in _with_section(table, rows):
        table.add_row(
            Text(row.domain, overflow="fold"),
            f"{row.pairs:,}",
            f"{row.off_loss:.3f}",
            f"{row.on_loss:.3f}",
            f"{row.off_margin:+.3f}",
            f"{row.on_margin:+.3f}" + ("" if row.on_margin_stderr is None else f" ±{row.on_margin_stderr:.3f}"),
        )
    table.caption = "measured against the base; ± standard error"
    return table


def _accuracies(lesson: str, rows: Sequence[PreferenceFigures]) -> Table:
    paired = rows[0].shorter is not None
    baselines = ("shorter", "longer", "log p", "mean") if paired else ()
    table = _table(f"Preferences by {lesson}: accuracy in %", "domain", ("n", "off", "on", *baselines))
    for row in _with_section(table, rows):
        untrained = (row.shorter, row.longer, row.base_log_prob, row.base_mean_log_prob) if paired else ()
        table.add_row(
            Text(row.domain, overflow="fold"),
            f"{row.pairs:,}",
            _share(row.off_accuracy),
            _share(row.on_accuracy, row.on_accuracy_stderr),
            *("" if value is None else _share(value) for value in untrained),
        )
    table.caption = "± standard error; of equals one half counts as right"
    if paired:
        table.caption += (
            "\nbeside it what needs no training: choose the shorter or longer answer in\nlabel tokens, or the one that "
            "the base finds likelier, log p in sum or mean"
        )
    return table


def _with_section(table: Table, rows: Sequence[OfDomain]) -> Iterator[OfDomain]:
    """The rows, with a line in the table before the sums over domains."""
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and row.domain in SUMS and before.domain not in SUMS:
            table.add_section()
        yield row


def _exported(evaluation: Evaluation) -> Table:
    table = _table(
        "Loss (nats per label token) and perplexity of the exported model, beside its run",
        "domain",
        ("tokens", "loss", "of the run", "difference", "perplexity"),
    )
    for row in evaluation.exported:
        run = "" if row.run_loss is None else f"{row.run_loss:.5f}"
        difference = "" if row.run_loss is None else f"{row.loss - row.run_loss:+.5f}"
        cells = (f"{row.label_tokens:,}", f"{row.loss:.5f}", run, difference, f"{row.perplexity:,.2f}")
        table.add_row(Text(row.domain, overflow="fold"), *cells)
    return table


def _choices(evaluation: Evaluation) -> Table:
    table = _table(
        "Multiple choice: accuracy in %, adapters off and on",
        "task",
        ("n", "random", "major.", "norm. off", "on", "plain off", "on"),
    )
    for row in evaluation.choices:
        table.add_row(
            Text(row.task, overflow="fold"),
            f"{row.questions:,}",
            f"{100 * row.random:.1f}",
            f"{100 * row.majority:.1f}",
            _share(row.off_normalised, row.off_normalised_stderr),
            _share(row.on_normalised, row.on_normalised_stderr),
            _share(row.off_plain),
            _share(row.on_plain),
        )
    table.caption = (
        "norm.: by log-likelihood a character, ± standard error; plain: by its sum\n"
        "major.: always the index that is right most often"
    )
    return table


def _tasks(evaluation: Evaluation) -> Table:
    table = _table("LM evaluation harness, adapters off and on", "task", ("metric", "off", "on"))
    for row in evaluation.tasks:
        off, on = (
            f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
            for value, error in ((row.off, row.off_stderr), (row.on, row.on_stderr))
        )
        table.add_row(Text(row.task, overflow="fold"), Text(row.metric), off, on)
    return table


def _sample(sample: Sample) -> Table:
    table = Table(title=Text(f"Sample: {sample.domain}", "bold"), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    answers = [("row", sample.reference)]
    if sample.rejected:
        compared = [("chosen", sample.reference), ("rejected", sample.rejected)]
        answers = compared if sample.reference else compared[1:]
    for name, text in (
        ("prompt", sample.prompt),
        *answers,
        ("adapters off", sample.off),
        ("adapters on", sample.on),
    ):
        table.add_row(name, Text(text if len(text) <= SHOWN else text[:SHOWN] + " …"))
    return table


def _share(value: float, error: float | None = None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f" ±{100 * error:.1f}")


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=Text(title, "bold"), title_justify="left", caption_justify="left", caption_style="dim")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
