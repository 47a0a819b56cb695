"""The planners of the strategies, one file each; which belongs to which name is declared in lmoe.rules.strategies."""

from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name

from lmoe.injection.plan import SitePlan
from lmoe.injection.site_plans import SitePlanner
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import InjectionStrategy

Planner = Callable[[SitePlanner], list[SitePlan]]
"""Names the sites of the chosen layers, and adds to the planner's warnings."""


@cache
def planner_of(strategy: InjectionStrategy) -> Planner:
    """The function that is declared as this strategy's planner."""
    planner: Planner = resolve_name(STRATEGIES[strategy].planner)
    return planner
