"""What an expert of a server may be called: its name stands in paths, and in mixtures that clients ask for."""

LONGEST_NAME = 200
NOT_IN_NAMES = "*+,=/"
"""Characters with a meaning where mixtures and paths are written."""


def name_problem(name: str) -> str | None:
    """Why an expert cannot have a name; None: it can."""
    wrong = name in ("", ".", "..") or name != name.strip() or len(name) > LONGEST_NAME or not name.isprintable()
    if not wrong and not any(sign in name for sign in NOT_IN_NAMES):
        return None
    return (
        f"an expert's name is 1 to {LONGEST_NAME} printable characters, no dots alone, without blanks around "
        f"it and without any of {' '.join(NOT_IN_NAMES)}; got {name[:LONGEST_NAME]!r}"
    )
