"""A table of a page of documentation, which a benchmark writes between two marks."""

from pathlib import Path


def put(table: str, page: Path, begin: str, end: str) -> None:
    """Write a table in place of what stands between the marks.

    Args:
        begin, end: lines of the page, each there once behind what is before.
    """
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")
