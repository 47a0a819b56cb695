"""The pictures of a study, each with a caption that says how to read it and a text that says what it shows."""

import base64
from dataclasses import dataclass

from matplotlib.figure import Figure

from lmoe.report.canvas import as_svg, plain
from lmoe.study.results.answer import shortened

MOST_CHARACTERS = 44
"""Of a title in a picture; the tables have all of it."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Picture:
    """A picture for a page.

    Args:
        title: its heading.
        caption: how to read it, and what it lacks.
        alt: what it shows, in words.
        figure: how it is drawn.
    """

    title: str
    caption: str
    alt: str
    figure: Figure

    def source(self) -> str:
        """The picture itself, as what an img of HTML shows."""
        return f"data:image/svg+xml;base64,{base64.b64encode(as_svg(self.figure)).decode('ascii')}"


def label(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text from a user on one line of a picture: cut where it is long, without what starts a formula or is no text."""
    return plain(shortened(text, most))
