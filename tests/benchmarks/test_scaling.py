"""The table of docs/SCALING.md is what the formulas say."""

from benchmarks.scaling import BEGIN, CASES, END, PAGE, row


def test_the_pages_table_has_every_case_and_its_first_row_is_fresh():
    """The others take longer, and come from the same formulas."""
    rows = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    assert len(rows) == len(CASES)
    for line, case in zip(rows, CASES, strict=True):
        assert line.startswith(f"| {case.base} | {case.precision} |")
    assert rows[0] == row(CASES[0]), "run `python -m benchmarks.scaling`"
