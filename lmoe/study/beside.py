"""Every arm beside the baseline, over all rows or domain by domain.

Shapes: S seeds, N rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lmoe.statistics.comparison import Comparison, Terms, compare, compare_domains
from lmoe.statistics.strata import Floats, Strata
from lmoe.study.judged import JudgedLosses

Pair = Callable[[str, str], tuple[Floats, Floats]]
"""(S, N) losses of an arm and of the baseline with the seeds that are compared, in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One arm beside the baseline.

    Args:
        arm: its name.
        domain: whose rows were compared; None: those of all domains.
        comparison: what came out.
        delta: (S, N) losses of the arm less those of the baseline.
        strata: of the N rows.
    """

    arm: str
    domain: str | None
    comparison: Comparison
    delta: Floats
    strata: Strata


def beside_baseline(judged: JudgedLosses, arms: Iterable[str], baseline: str, pair: Pair, terms: Terms) -> list[Beside]:
    """The arms on the mean over domains; those without a seed to compare are left out.

    Args:
        arms: the baseline among them is passed over.
    """
    found = []
    for arm in arms:
        mine, others = pair(arm, baseline)
        if arm != baseline and len(mine):
            comparison = compare(arm, mine, others, judged.strata, terms)
            found.append(Beside(arm=arm, domain=None, comparison=comparison, delta=mine - others, strata=judged.strata))
    return found


def beside_by_domain(
    judged: JudgedLosses, arms: Iterable[str], baseline: str, pair: Pair, terms: Terms
) -> list[Beside]:
    """The arms in each domain; nothing where there is one domain. Arguments as of `beside_baseline`."""
    found = []
    if len(judged.strata.names) < 2:
        return found
    for arm in arms:
        mine, others = pair(arm, baseline)
        if arm == baseline or not len(mine):
            continue
        for domain, comparison in compare_domains(arm, mine, others, judged.strata, terms).items():
            delta = (mine - others)[:, judged.strata.rows_of(domain)]
            own = judged.strata.only(domain)
            found.append(Beside(arm=arm, domain=domain, comparison=comparison, delta=delta, strata=own))
    return found
