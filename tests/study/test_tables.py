"""Tables hold whatever titles hold."""

import io

from rich.console import Console

from lmoe.study.csv_tables import as_csv
from lmoe.study.tables import as_latex, as_markdown, rich_table

ROWS = [["arm", "p"], ["50 % | a_b & <c>\n$x^2$ ~ \\d {e} #", "< 0.001"]]


def test_a_title_with_marks_stays_one_cell_in_every_format():
    markdown = as_markdown(ROWS)
    assert markdown.splitlines()[2] == r"| 50 % \| a\_b & \<c\> $x^2$ ~ \\d {e} # | \< 0.001 |"
    row = as_latex("a < b", ROWS).splitlines()[6]
    assert row == (
        r"50 \% \textbar{} a\_b \& \textless{}c\textgreater{} \$x\textasciicircum{}2\$ \textasciitilde{} "
        r"\textbackslash{}d \{e\} \# & \textless{} 0.001 \\"
    )
    assert as_csv(ROWS).startswith('arm,p\n"50 % | a_b & <c>\n')


def test_brackets_in_headings_and_cells_stay_brackets() -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(rich_table("[/a]", [["", "[red]code"], ["[/b]", "1.0"]]))
    assert all(words in text.getvalue() for words in ("[/a]", "[red]code", "[/b]"))
