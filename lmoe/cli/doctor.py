"""`lmoe doctor`: what a report of a fault says of the machine, and whether anything that lmoe needs is broken."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmoe.cli.threads import SPINS, WAITING, core_quota, own_cores
from lmoe.report.say import say
from lmoe.run.doctor import findings
from lmoe.run.findings import Finding, State, findings_of

COLOURS = {State.fine: "", State.note: "yellow", State.unknown: "yellow", State.broken: "bold red"}


def run(*, as_json: bool) -> int:
    """Returns the exit code: 1 where something that lmoe needs is broken."""
    found = list(findings())
    devices = 1 + max(number for number, one in enumerate(found) if one.section == "devices")
    found[devices:devices] = findings_of("devices", "threads", _threads)
    broken = [one for one in found if one.state is State.broken]
    if hasattr(sys.stdout, "reconfigure"):  # a path may hold what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if as_json:
        report = {"broken": [one.name for one in broken], "findings": [asdict(one) for one in found]}
        print(json.dumps(report, indent=2))
        return bool(broken)
    console = Console()
    for section, lines in groupby(found, key=lambda one: one.section):
        if console.is_terminal:
            console.print(_table(section, list(lines)))
        else:
            say(console, f"{section}:\n" + "\n".join(f"  {_line(one)}" for one in lines))
    say(console, "nothing that lmoe needs is broken" if not broken else f"{len(broken)} broken:")
    for one in broken:
        say(console, f"  {_line(one)}")
    return bool(broken)


def _threads() -> Iterator[Finding]:
    """Cores and threads of this process, and how threads that wait do so."""
    quota = core_quota()
    cores = f"{own_cores()} of {os.cpu_count()}" + ("" if quota is None else f", of which a quota lets {quota} work")
    yield Finding(section="devices", name="cores", value=cores)
    for name in ("OMP_NUM_THREADS", *WAITING):
        value = os.environ.get(name)
        advice = "as lmoe sets it" if name == "GOMP_SPINCOUNT" and value == SPINS else ""
        yield Finding(section="devices", name=name, value=value or "not set", advice=advice)
    import torch

    yield Finding(section="devices", name="threads of torch", value=str(torch.get_num_threads()))


def _line(one: Finding) -> str:
    """A finding as plain text."""
    state = "" if one.state is State.fine else f"{one.state}: "
    return f"{one.name}: {state}{one.value}" + (f" -> {one.advice}" if one.advice else "")


def _table(section: str, lines: list[Finding]) -> Table:
    """The findings of a section for a terminal."""
    table = Table(title=section, title_justify="left", title_style="bold", show_header=False)
    for one in lines:
        table.add_row(one.name, Text(one.value, style=COLOURS[one.state]), Text(one.advice))
    return table
