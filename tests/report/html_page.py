"""A page of HTML, parsed: for the tests of pages."""

from html.parser import HTMLParser

VOID = {"meta", "img", "input"}


class ParsedPage(HTMLParser):
    """Tags, attributes, text by class, rows of tables; fails on tags that do not close in order.

    Args:
        text: the page.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, set[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.pieces: list[tuple[str, set[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, {tag, *(dict(attrs).get("class") or "").split()}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append((data, set().union(*(kinds for _, kinds in self.open))))
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value for _, attribute, value in self.attributes if attribute == name]

    def text(self, *kinds: str, without: str = "") -> str:
        """What stands within a tag or class of each of these names, and within none called `without`."""
        return "".join(data for data, within in self.pieces if {*kinds} <= within and without not in within)
