"""Stop strings: an answer ends before the first of them, of which a stream never shows a part."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class StopStrings:
    """Looks for stop strings in text that comes in pieces.

    The one that is whole first ends the answer, of several the one that began first: so it does not matter how the
    text is cut into pieces.

    Args:
        stops: none of them empty.
    """

    stops: Sequence[str]
    found: bool = False
    _held: str = field(default="")

    def push(self, piece: str) -> str:
        """What can be shown now, given the next piece: all but what may turn out to be the beginning of a stop string;
        nothing after one was found."""
        if self.found:
            return ""
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        kept = len(text) - max((self._begun(text, stop) for stop in self.stops), default=0)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back, when no more comes."""
        text, self._held = self._held, ""
        return "" if self.found else text

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Length of the longest beginning of a stop string with which the text ends."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
