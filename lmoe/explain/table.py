"""An explanation as tables for the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmoe.explain.explanation import ExplainedText, Explanation
from lmoe.explain.page import largest, shown_token, signed
from lmoe.report.say import say
from lmoe.report.tokens import visible

MOST_ROWS = 40
"""Tokens of a text that are listed; the page has all of them."""
MOST_EXPERTS = 32
"""Experts that are listed."""


def print_explanation(console: Console, found: Explanation) -> None:
    """Print of each text what every expert does to it on the mean, and its last tokens; the notes last."""
    for text in found.texts:
        console.print()
        if found.experts:
            console.print(_experts(found, text))
        console.print(_tokens(found, text))
        if len(text.tokens) > MOST_ROWS:
            say(console, f"the last {MOST_ROWS} of {len(text.tokens):,} tokens; the page has all of them")
    for note in found.notes:
        say(console, f"note: {visible(note)}")


def _experts(found: Explanation, text: ExplainedText) -> Table:
    table = Table(title=Text(f"{visible(text.tokens.name)}: mean over its tokens"), title_justify="left")
    table.add_column("expert", overflow="fold")
    for name in ("weight", "text", "token"):
        table.add_column(name, justify="right")
    weights, known = text.mean_weights(len(found.experts)), text.mixture.isfinite()
    for expert, name in list(enumerate(found.experts))[:MOST_EXPERTS]:
        parts = (float(changes[known, expert].mean()) for changes in (text.text, text.token))
        table.add_row(
            Text(_label(expert, name)), f"{float(weights[:, expert].mean()):.3f}", *(signed(part) for part in parts)
        )
    return table


def _tokens(found: Explanation, text: ExplainedText) -> Table:
    table = Table(title="log-probability, and the expert without which it changes most")
    table.add_column("token", overflow="fold")
    for name in ("expert", "log p", "base", "by text", "", "by token", ""):
        table.add_column(name, justify="right")
    for row in _rows(found, text):
        table.add_row(*(Text(cell) for cell in row))
    return table


def _rows(found: Explanation, text: ExplainedText) -> Iterator[tuple[str, ...]]:
    mean, length = text.mean_weights(len(found.experts)), len(text.tokens)
    for i in range(max(0, length - MOST_ROWS), length):
        cells: list[str] = []
        for changes in (text.text[i].nan_to_num(0.0), text.token[i].nan_to_num(0.0)):
            most = largest(changes)
            cells += ["-", ""] if most is None else [f"{most}", signed(float(changes[most]))]
        expert = largest(mean[i])
        shown = shown_token(text.tokens, i).replace("\n", "").replace("\t", "")
        logs = (signed(float(values[i])) for values in (text.mixture, text.base))
        yield shown, "-" if expert is None else f"{expert}", *logs, *cells


def _label(expert: int, name: str) -> str:
    return f"{expert}" if name == f"{expert}" else f"{expert} {visible(name)}"
