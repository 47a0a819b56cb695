"""Where the router row of a new expert starts.

Shapes: E experts, N new ones, D in.
"""

from torch import Tensor

SPREAD = 0.1


def new_router_rows(old: Tensor, fresh: Tensor) -> Tensor:
    """mean_e W_e + 0.1 * fresh: every token gives a new expert about the mean of its old logits.

    So a new expert is never the first choice, unless all old ones are equal, and by Jensen's inequality its softmax
    probability is at most about 1 / (E + 1), whatever the old logits are; a zero row would take over wherever all
    of them are negative. The fresh part tells several new experts apart.

    Args:
        old: (E, D) rows, or (E,) selection biases.
        fresh: (N, D) rows as a new router has them, or (N,).

    Returns:
        (N, D), or (N,).
    """
    return old.mean(dim=0, keepdim=True).to(fresh) + SPREAD * fresh
