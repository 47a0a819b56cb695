"""The line that says where a run is."""

from io import StringIO

import pytest
from rich.console import Console

from lmoe.training.callbacks.progress_line import ProgressLine


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
@pytest.mark.parametrize("phase", ["[/b]", "[red]joint"])
def test_brackets_in_the_name_of_a_phase_stay_brackets(phase: str, is_terminal: bool) -> None:
    file = StringIO()
    with ProgressLine(1, Console(file=file, force_terminal=is_terminal, width=120), enabled=True) as line:
        line.step(1, phase, 0.5)
    assert phase in file.getvalue()
