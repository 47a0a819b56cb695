"""When a site counts as collapsed."""

import pytest

from lmoe.metrics.routing import SiteRouting
from lmoe.training.callbacks.collapse_watch import collapse_reason


def site(*load: float) -> SiteRouting:
    return SiteRouting(load=list(load), entropy=0.5, effective=1.0)


@pytest.mark.parametrize(
    ("load", "active", "said"),
    [
        ((0.9, 0.05, 0.05), 1, "expert 0 gets 90% of the tokens"),
        ((0.0, 1.0), 1, "expert 1 gets 100% of the tokens"),
        ((0.5, 0.5, 0.0, 0.0), 2, "only 2 of 4 experts get more than 5% of the tokens"),
        ((0.48, 0.48, 0.04, 0.0), 2, "only 2 of 4"),
        ((0.79, 0.21), 1, None),
        ((0.25, 0.25, 0.25, 0.25), 2, None),
        ((0.4, 0.4, 0.2, 0.0), 2, None),
        ((0.5, 0.5), 2, None),  # every token goes to both
        ((1.0,), 1, None),  # there is no other expert
    ],
)
def test_collapse(load, active, said):
    reason = collapse_reason(site(*load), active)
    assert (reason is None) if said is None else (said in str(reason))
