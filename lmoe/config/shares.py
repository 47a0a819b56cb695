"""Settings that are a number or a share of a whole, such as 20%."""

import math


def share_of(text: str, whole: int) -> int | None:
    """A share of a whole, rounded up, and at least 1 for any share above 0.

    Args:
        text: such as "20%".
        whole: what it is a share of.

    Returns:
        None where the text has no percent sign.

    Raises:
        ValueError: not a share from 0% to 100%.
    """
    if not text.endswith("%"):
        return None
    share = float(text[:-1]) / 100
    if not 0 <= share <= 1:
        raise ValueError
    return max(math.ceil(round(share * whole, 9)), int(share > 0))
