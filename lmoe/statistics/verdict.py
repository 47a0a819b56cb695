"""What may be said of a family of comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lmoe.statistics.comparison import Comparison
from lmoe.statistics.families import holm

FEWEST_SEEDS = 3
"""Seeds below which nothing is claimed: two tell the spread over seeds by a single distance."""


class Verdict(StrEnum):
    """What the study says of an arm beside the baseline."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"
    TOO_FEW_SEEDS = "too few seeds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A comparison with its verdict. Whether there is a difference and whether it is small are two questions.

    Args:
        comparison: what was judged.
        verdict: BETTER or WORSE where a difference was shown, else EQUIVALENT where it was shown to be smaller than the
            margin, else UNDECIDED; TOO_FEW_SEEDS below three seeds.
        within_margin: whether the difference was shown to be smaller than the margin, whatever the verdict. With BETTER
            or WORSE both hold: a difference that is real and too small to matter.
        difference_p: Holm-adjusted in the family of the differences; None with too few seeds.
        equivalence_p: Holm-adjusted in the family of the equivalences; None with too few seeds.
        family: number of comparisons that were adjusted together.
    """

    comparison: Comparison
    verdict: Verdict
    within_margin: bool
    difference_p: float | None
    equivalence_p: float | None
    family: int

    def sentence(self) -> str:
        """The verdict in words, such as "better, by less than 0.01"."""
        margin = f"{self.comparison.margin:g}"
        match self.verdict:
            case Verdict.BETTER | Verdict.WORSE:
                return f"{self.verdict}, by less than {margin}" if self.within_margin else str(self.verdict)
            case Verdict.EQUIVALENT:
                return f"equivalent within {margin}"
            case Verdict.TOO_FEW_SEEDS:
                return f"too few seeds: {self.comparison.seeds}, and a verdict needs {FEWEST_SEEDS}"
            case _:
                spread = self.comparison.spread
                assert spread is not None, "undecided is said of three seeds or more"
                return (
                    f"cannot be told: a difference of {spread.smallest_effect:.2g} could have been seen "
                    f"(with probability {self.comparison.power:g}, taken alone)"
                )


def judge(comparisons: Sequence[Comparison], alpha: float = 0.05) -> list[Judged]:
    """The verdicts of a family: each arm beside the baseline, or each arm in each domain.

    The differences are one family at alpha and the equivalences another (Holm 1979 in each), since "there is a
    difference" and "it is smaller than the margin" are separate claims, and can both be true. In at most alpha of
    studies some true no-difference is called better or worse; in at most alpha some difference of the margin or more is
    called smaller than it. A difference has the sign of its estimate. Comparisons with too few seeds are not judged and
    do not count in the families.

    Args:
        comparisons: names must differ.

    Returns:
        In the order they were given.
    """
    names = [comparison.name for comparison in comparisons]
    if len(set(names)) < len(names):
        raise ValueError(f"comparisons of a family need names of their own, got {names}.")
    spreads = {c.name: c.spread for c in comparisons if c.spread is not None and c.seeds >= FEWEST_SEEDS}
    differences = holm({name: spread.difference_p for name, spread in spreads.items()})
    equivalences = holm({name: spread.equivalence_p for name, spread in spreads.items()})
    judged = []
    for comparison in comparisons:
        difference = differences.get(comparison.name)
        equivalence = equivalences.get(comparison.name)
        within = equivalence is not None and equivalence < alpha
        judged.append(
            Judged(
                comparison=comparison,
                verdict=verdict_of(comparison.estimate, difference, within, alpha),
                within_margin=within,
                difference_p=difference,
                equivalence_p=equivalence,
                family=len(spreads),
            )
        )
    return judged


def verdict_of(estimate: float, difference_p: float | None, within: bool, alpha: float) -> Verdict:
    """What may be said of a comparison.

    Args:
        estimate: the difference.
        difference_p: Holm-adjusted; None with too few seeds.
        within: whether the difference was shown to be smaller than the margin.
        alpha: of the family.
    """
    if difference_p is None:
        return Verdict.TOO_FEW_SEEDS
    if difference_p < alpha:
        return Verdict.BETTER if estimate < 0 else Verdict.WORSE
    return Verdict.EQUIVALENT if within else Verdict.UNDECIDED
