"""What a claim was tried on, and the table of all."""

import datetime
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEADS = ("claim", "tried", "passed", "seconds", "figures")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One claim.

    Args:
        claim: in words.
        tried, passed: cases.
        seconds: wall clock.
        command, date: what was typed, and when.
        figures: measured on the way, by name.
        failures: one line for each case that did not pass.
    """

    claim: str
    tried: int = 0
    passed: int = 0
    seconds: float = 0.0
    command: str = ""
    date: str = ""
    figures: dict[str, str | int | float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether the claim held in every case, and there was one."""
        return self.tried > 0 and self.passed == self.tried

    def judge(self, case: str, problem: str | None) -> None:
        """Count a case; `problem` says why it did not pass."""
        self.tried += 1
        if problem is None:
            self.passed += 1
            return
        self.failures.append(f"{case}: {problem}")
        sys.stderr.write(f"FAILED {case}: {problem}\n")

    def count(self, name: str, by: int = 1) -> None:
        """Add to a figure."""
        self.figures[name] = int(self.figures.get(name, 0)) + by


def timed(claim: str, prove: Callable[[Outcome], None], command: str = "") -> Outcome:
    """The outcome of a claim, with the time that it took."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    outcome, started = Outcome(claim=claim, command=command, date=date), time.monotonic()
    sys.stderr.write(f"{claim} …\n")
    try:
        prove(outcome)
    except KeyboardInterrupt:  # what was tried until then counts, and nothing else
        outcome.figures["stopped"] = "by hand"
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a table in Markdown."""
    rows = [
        [
            outcome.claim,
            str(outcome.tried),
            str(outcome.passed) + ("" if outcome.kept else " **MISSED**"),
            f"{outcome.seconds:.0f}",
            ", ".join(f"{name} {value}" for name, value in outcome.figures.items()),
        ]
        for outcome in outcomes
    ]
    lines = [f"| {' | '.join(row)} |" for row in (list(HEADS), *rows)]
    lines.insert(1, "|---|---:|---:|---:|---|")
    failures = [f"- {failure}" for outcome in outcomes for failure in outcome.failures]
    return "\n".join([*lines, *(["", *failures] if failures else [])]) + "\n"


def write(outcomes: list[Outcome], machine: dict[str, str | int], folder: Path, name: str = "torture") -> list[Outcome]:
    """<name>.json and <name>.md; claims that were not tried this time keep what they have there.

    Returns:
        All of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["claims"] if file.exists() else []
    known = {entry["claim"]: Outcome(**entry) for entry in earlier} | {outcome.claim: outcome for outcome in outcomes}
    every = list(known.values())
    content = {"machine": machine, "claims": [asdict(outcome) for outcome in every]}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    commands = [f"- {outcome.date} `{outcome.command}`: {outcome.claim}" for outcome in every]
    page = "\n".join([f"# {name.capitalize()}", "", facts, "", table(every), *commands]) + "\n"
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    return every
