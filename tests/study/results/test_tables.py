"""Tables hold whatever titles hold."""

import io

from rich.console import Console

from lmoe.study.results.csv_tables import as_csv
from lmoe.study.results.tables import as_latex, as_markdown, rich_table, write_tables
from tests.study.made_results import usual_result

ROWS = [["arm", "p"], ["50 % | a_b & <c>\n$x^2$ ~ \\d {e} #", "< 0.001"]]


def test_a_title_with_marks_stays_one_cell_in_every_format():
    markdown = as_markdown(ROWS)
    assert markdown.splitlines()[2] == r"| 50 % \| a_b \& \<c\> \$x^2\$ \~ \\d {e} \# | \< 0.001 |"
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


def test_a_cell_is_no_argument_of_the_command_before_it():
    lines = as_latex("[a]", [["[arm]", "p"], ["[new] arm", "1"], ["* best", "2"]]).splitlines()
    assert lines[1] == r"\caption{{[}a{]}}"
    assert lines[4] == r"{[}arm{]} & p \\"
    assert lines[6:8] == [r"{[}new{]} arm & 1 \\", r"{*} best & 2 \\"]


def test_what_users_and_libraries_say_stays_text_in_markdown(tmp_path):
    nasty, escaped = "[a](b) | *c* <d> &amp; ~e~ $f$", r"\[a\](b) \| \*c\* \<d\> \&amp; \~e\~ \$f\$"
    given = usual_result(question=nasty, command="lmoe study 'name=`x`'", notes=[nasty])
    given.arms[1].failures = [f"a job: {nasty}"]
    write_tables(given, tmp_path)
    text = (tmp_path / "study.md").read_text("utf-8")
    assert text.count(escaped) == 3 and nasty not in text
    assert "\n```sh\nlmoe study 'name=`x`'\n```\n" in text
