"""How messages show what they were given: in one line, and with an end."""

import math
import reprlib
from typing import Any

LONGEST = 60
"""Characters of a value that a message shows."""
LONGEST_REASON = 400
"""Of what a library says, of a list of names, or of a key."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST
_SHORT.maxlist = _SHORT.maxdict = 12


def shown(value: Any, *, longest: int = LONGEST) -> str:
    """A value as it is written on the command line, shortened where it has more than `longest` characters."""
    if isinstance(value, int) and abs(value) > 10**LONGEST:
        return f"a whole number of about {round(math.log10(abs(value)))} digits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return _shortened(f"[{','.join(shown(item) for item in value[:LONGEST])}]", longest)
    if isinstance(value, dict):
        items = [f"{shown(name)}: {shown(item)}" for name, item in list(value.items())[:LONGEST]]
        return _shortened(f"{{{', '.join(items)}}}", longest)
    return _shortened(str(value), longest) or "empty"


def quoted(value: Any) -> str:
    """A value from a file as Python writes it, with quotes around text, shortened where it is long."""
    return _shortened(_SHORT.repr(value), LONGEST_REASON)


def first_line(error: BaseException) -> str:
    """What a library says, in one line that is not too long; of one that says nothing the type of the error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _shortened(line, LONGEST_REASON)


def _shortened(text: str, longest: int) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
