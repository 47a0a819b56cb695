"""Tables for the terminal at the end of a run; 80 columns, and readable in a log without colours."""

import re

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lmoe.report.loads import ExpertLoad, expert_loads
from lmoe.report.say import say
from lmoe.report.summary import FINISHED, RunSummary
from lmoe.report.targets import TargetReport
from lmoe.report.wording import (
    RUN_FILES,
    duration,
    experts,
    loss_rows,
    memory,
    percent,
    steps,
    target_lines,
    target_rows,
)
from lmoe.vocabulary import DEAD_SHARE

BAR_WIDTH = 20
"""Characters of the longest bar."""

MAX_EXPERTS = 32
"""With more experts, only the busiest and the idlest are listed."""

MAX_TARGETS = 32
"""With more targets, only those that are chosen least rightly are listed."""

COMMAND_WIDTH = 76
"""Longer commands are continued on the next line with a backslash, which a shell accepts when copied."""


def print_end(console: Console, summary: RunSummary, next_commands: list[str]) -> None:
    """Print loss by domain, load of each expert, collapse warnings, where things are, and what to run next.

    Tables keep to the width of the console. Paths and commands stay whole, so that they can be copied from a log.
    """
    parts: list[RenderableType] = [Text(_what_ran(summary)), Text(), loss_table(summary), Text()]
    if summary.site_load:
        parts += [load_table(summary), Text()]
    if summary.targets is not None:
        parts += [target_table(summary.targets), Text()]
    parts += [Text(f"warning: {message}", style="bold yellow") for message in summary.collapsed]
    console.print(Group(*parts))
    console.print(Text.assemble(("In ", "bold"), summary.run_dir), soft_wrap=True)
    console.print(_places())
    if next_commands:
        console.print(Text.assemble("\n", ("Try next:", "bold")))
        for command in next_commands:
            say(console, continued(command, indent="  "))


def loss_table(summary: RunSummary) -> Table:
    """Validation loss of each domain before and after, and the mean."""
    table = _table(f"{summary.loss_title} ({summary.loss_measure})", "domain")
    for heading in ("adapters off", "after", "change", "in %"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = loss_rows(summary)
    for i, row in enumerate(rows):
        style = {True: "green", False: "red", None: ""}[row.improved]
        table.add_row(Text(row.label, overflow="fold"), row.before, row.after, Text(row.change, style), row.percent)
        if i == len(summary.domains) - 1 and len(rows) > len(summary.domains):
            table.add_section()
    return table


def load_table(summary: RunSummary) -> Table:
    """Load of each expert over the sites: mean, lowest, highest, and where it is dead; of one router, just its load."""
    loads, several = expert_loads(summary.site_load), len(summary.site_load) > 1
    over = ", over the sites" if several else ""
    table = _table(f"Load of each expert (share of assignments{over})", "expert")
    table.add_column("mean" if several else "load", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=BAR_WIDTH)
    for heading in ("min", "max", "dead at") if several else ("dead",):
        table.add_column(heading, justify="right", no_wrap=True)
    longest = max(load.mean for load in loads)
    for load in _listed(loads):
        bar = "#" * round(BAR_WIDTH * load.mean / longest) if longest > 0 else ""
        style = "bold red" if load.dead_sites else ""
        dead = f"{load.dead_sites} of {load.sites} sites" if several else "dead" if load.dead_sites else ""
        spread = (percent(load.lowest), percent(load.highest)) if several else ()
        table.add_row(
            Text(summary.expert_label(load.expert)), percent(load.mean), bar, *spread, Text(dead, style=style)
        )
    uniform = sorted({1 / len(shares) for shares in summary.site_load.values()})
    table.caption = f"uniform: {' or '.join(map(percent, uniform[:4]))}; dead: below {DEAD_SHARE:g} of uniform"
    if len(loads) > MAX_EXPERTS:
        table.caption += f"\nthe {MAX_EXPERTS // 2} busiest and {MAX_EXPERTS // 2} idlest of {len(loads)} experts"
    return table


def target_table(report: TargetReport) -> Group:
    """A table of targets: rows that have it, for how many of them it is chosen, and what else is chosen most."""
    table = _table(f"What routers choose, by the {report.kind} of the row", report.kind)
    for heading in ("rows", "chosen rightly"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("chosen instead", overflow="fold")
    rows = target_rows(report)
    shown = range(len(rows))
    if len(rows) > MAX_TARGETS:
        worst = sorted(shown, key=lambda label: _rightness(report, label))[:MAX_TARGETS]
        shown = sorted(worst)
    for label in shown:
        row = rows[label]
        table.add_row(Text(row.label, overflow="fold"), row.rows, row.right, Text(row.other, overflow="fold"))
        if label == len(report.targets) - 1 and report.untrained:
            table.add_section()
    lines = target_lines(report)
    if len(rows) > MAX_TARGETS:
        lines.append(f"the {MAX_TARGETS} of {len(rows)} with the fewest right choices")
    return Group(table, *(Text(line, style="dim") for line in lines))


def _rightness(report: TargetReport, label: int) -> float:
    """The share of right choices, to sort by; what has none to make comes last."""
    right = report.right(label) if label < len(report.targets) else None
    return 2.0 if right is None else right


def continued(command: str, indent: str = "") -> str:
    """A long shell command over several lines, broken between arguments only, never inside quotes."""
    words = re.findall(r"""(?:[^\s"']|"(?:\\.|[^"\\])*"|'[^']*')+""", command)
    if " ".join(words) != command:
        return indent + command
    lines = [indent + words[0]]
    for i, word in enumerate(words[1:], start=1):
        # An option stays with its value.
        unit = f"{word} {words[i + 1]}" if word.startswith("--") and i + 1 < len(words) else word
        if len(lines[-1]) + 1 + len(unit) > COMMAND_WIDTH and not words[i - 1].startswith("--"):
            lines.append(f"{indent}  {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _listed(loads: list[ExpertLoad]) -> list[ExpertLoad]:
    if len(loads) <= MAX_EXPERTS:
        return loads
    ranked = sorted(loads, key=lambda load: load.mean, reverse=True)
    return ranked[: MAX_EXPERTS // 2] + ranked[-MAX_EXPERTS // 2 :]


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", title_style="bold", caption_style="dim")
    table.add_column(first, overflow="fold", justify="right" if first == "expert" else "left")
    return table


def _what_ran(summary: RunSummary) -> str:
    ended = "" if summary.ended == FINISHED else f"ended before: {summary.ended}\n"
    return (
        f"{summary.name}: {steps(summary)} steps in {duration(summary.seconds)}, peak memory "
        f"{memory(summary.peak_memory_mb)}\n{ended}{summary.backbone}, {experts(summary)}, "
        f"{summary.trainable_parameters:,} trainable parameters"
    )


def _places() -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, purpose in RUN_FILES.items():
        grid.add_row(f"  {name}", purpose)
    return grid
