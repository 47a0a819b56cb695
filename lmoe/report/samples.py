"""What training sees of the first rows, as text for the terminal and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lmoe.report.html import render
from lmoe.report.tokens import LEARNT_MARKS, TokenRun, token_runs, visible
from lmoe.report.wording import percent

if TYPE_CHECKING:
    from lmoe.data.show import ShownSample

LEARNT, NOT_LEARNT = "bold green", "dim"
IN_COLOUR = "bold and green: learnt; dim: seen, not learnt; underlined: special tokens; ↵ a line break"
IN_MARKS = "⟦…⟧ is learnt, the rest is seen and not learnt; ↵ is a line break"


@dataclass(slots=True, frozen=True, kw_only=True)
class Figures:
    """Sums over samples."""

    samples: int
    """Rows."""
    tokens: int
    """That training sees."""
    learnt: int
    """That the loss is taken on."""
    cut: int
    """Behind data.max_length."""
    turns: int
    """Of the assistant that are learnt."""
    ends_learnt: int
    """Turns of these whose end is learnt."""

    @property
    def share(self) -> str:
        """Learnt tokens in percent of those that training sees."""
        return percent(self.learnt / self.tokens) if self.tokens else "-"

    @property
    def ends(self) -> str:
        """Ends that are learnt, of all."""
        return f"{self.ends_learnt:,} of {self.turns:,}"


def figures(samples: "Sequence[ShownSample]") -> Figures:
    """Sums over samples."""
    return Figures(
        samples=sum(not sample.of_row_before for sample in samples),
        tokens=sum(sample.kept for sample in samples),
        learnt=sum(sample.learnt for sample in samples),
        cut=sum(sample.cut for sample in samples),
        turns=sum(sample.turns for sample in samples),
        ends_learnt=sum(sample.ends_learnt for sample in samples),
    )


def figures_line(sample: "ShownSample") -> str:
    """Where a sample is from, its domain and its figures, in one line."""
    words = [f"domain {visible(sample.domain)}" if sample.domain else "", sample.answer]
    words += [counts_line(sample), unlearnt_line(sample)]
    words += [visible(sample.note), ignored_line(sample)]
    return f"{visible(sample.where)}: {'; '.join(word for word in words if word)}"


def counts_line(sample: "ShownSample") -> str:
    """Tokens of a sample; empty of one that has none."""
    if not sample.tokens:
        return ""
    sums = figures([sample])
    learnt = f"{sums.learnt:,} learnt ({sums.share})"
    return f"{sums.tokens:,} tokens, {learnt}, {sums.cut:,} cut, turn ends learnt: {sums.ends}"


def ignored_line(sample: "ShownSample") -> str:
    """Fields that nothing is made of; empty where there are none."""
    return f"ignored fields: {visible(', '.join(sample.ignored))}" if sample.ignored else ""


def cut_line(sample: "ShownSample") -> str:
    """How many tokens are cut, and how many of them are shown; empty where none is."""
    if not sample.cut:
        return ""
    there = len(sample.tokens) - sample.kept
    shown = "" if there == sample.cut else f", of which the first {there:,} are shown"
    return f"cut here, behind {sample.kept:,} tokens: {sample.cut:,} more{shown}"


def unlearnt_line(sample: "ShownSample") -> str:
    """Return a sentence about ends of turns that are not learnt, or nothing."""
    missing = sample.turns - sample.ends_learnt
    if not missing:
        return ""
    return f"the end of {missing:,} of {sample.turns:,} turns is not learnt, so there the model does not learn to stop"


def print_samples(console: Console, samples: "Sequence[ShownSample]") -> None:
    """Print samples in colour, or where there is none with marks around what is learnt; long lines stay whole."""
    coloured = console.color_system is not None and not console.no_color
    _print(console, Text(IN_COLOUR if coloured else IN_MARKS, "italic"))
    for sample in samples:
        warn = bool(sample.note) or sample.ends_learnt < sample.turns
        _print(console, Text(f"\n{figures_line(sample)}", "bold yellow" if warn else "bold"))
        runs = token_runs(sample)
        if runs:
            _print(console, _styled([run for run in runs if not run.cut], coloured=coloured))
        if sample.cut:
            _print(console, Text(cut_line(sample), "italic"))
            _print(console, _styled([run for run in runs if run.cut], coloured=coloured))
    console.print()


def _styled(runs: Sequence[TokenRun], *, coloured: bool) -> Text:
    text = Text()
    for run in runs:
        before, behind = LEARNT_MARKS if run.learnt and not coloured else ("", "")
        style = LEARNT if run.learnt else NOT_LEARNT
        text.append(before)
        for token in run.tokens:
            text.append(token.text, f"{style} underline" if token.special else style)
        text.append(behind)
    if text.plain.endswith("\n"):
        text.right_crop(1)  # the line ends anyway
    return text


def _print(console: Console, text: Text) -> None:
    """Print text whose characters the terminal may not have."""
    if not console.encoding.lower().startswith("utf"):
        text = Text(text.plain.encode(console.encoding, "backslashreplace").decode(console.encoding))
    console.print(text, soft_wrap=True, highlight=False)


def samples_page(samples: "Sequence[ShownSample]", settings: Mapping[str, str]) -> str:
    """The page of samples.

    Args:
        settings: what they were made with, for the reader.
    """
    domains = [(name, list(of_it)) for name, of_it in groupby(samples, key=lambda sample: sample.domain)]
    return render(
        "samples.html.jinja",
        title="What training sees",
        settings={name: visible(value) for name, value in settings.items()},
        domains=[
            {
                "name": visible(name) or "(no name)",
                "figures": figures(of_it),
                "samples": [
                    {
                        "where": visible(sample.where) + (f": {sample.answer}" if sample.answer else ""),
                        "counts": counts_line(sample),
                        "seen": [run for run in token_runs(sample) if not run.cut],
                        "cut": [run for run in token_runs(sample) if run.cut],
                        "cut_line": cut_line(sample),
                        "unlearnt": unlearnt_line(sample),
                        "note": visible(sample.note),
                        "ignored": ignored_line(sample),
                    }
                    for sample in of_it
                ],
            }
            for name, of_it in domains
        ],
        total=figures(samples),
    )
