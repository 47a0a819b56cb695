"""Lengths of what is read in a forward of its own."""

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
