"""Lengths of what is read of a row, and in a forward of its own."""

OPENING = 128
"""Tokens of a text that stand for its prompt, at most: past the heading that all texts of a set may begin with."""
MULTIPLE = 16
"""Lengths are rounded up to a multiple of this: kernels are made, and kept, for each shape."""


def rounded_length(tokens: int, most: int | None = None) -> int:
    """How many tokens are read where so many are needed, at least one.

    Args:
        tokens: that are needed.
        most: that there are; None: what is missing is padding.
    """
    length = max(-(-tokens // MULTIPLE), 1) * MULTIPLE
    return length if most is None else min(length, most)


def opening_length(tokens: int) -> int:
    """How many tokens of a text without a prompt stand for one: OPENING, at most half of it."""
    return min(OPENING, tokens // 2)
