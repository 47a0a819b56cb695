"""What a study has found, in one sentence made from its primary comparisons."""

from collections.abc import Mapping, Sequence

from lmoe.statistics.verdict import FEWEST_SEEDS, Verdict, verdict_of
from lmoe.study.results.result import EDGE, ComparisonResult, StudyResult

ORDER = (Verdict.BETTER, Verdict.WORSE, Verdict.EQUIVALENT, Verdict.UNDECIDED, Verdict.TOO_FEW_SEEDS)

MOST_CHARACTERS = 60
"""Of a title in a sentence; the tables have all of it."""


def answer(result: StudyResult) -> str:
    """Who is better or worse than the baseline or equivalent to it, of whom that cannot be told, and why not."""
    baseline = result.arm(result.baseline)
    compared = {found.arm for found in result.primary}
    others = [arm for arm in result.arms if arm.name != baseline.name and arm.name not in compared]
    missing = [arm.title for arm in others if arm.loss is None]
    if not result.primary:
        absent = [*([baseline.title] if baseline.loss is None else []), *missing]
        return (
            f"Nothing can be told, because {listed(absent)} {_were(absent)} not judged."
            if absent
            else ("Nothing can be told, because no arm was judged with a seed of the baseline.")
        )
    firm = [found for found in result.primary if found.verdict != EDGE]
    parts = _clauses(result, firm)
    if edge := [found for found in result.primary if found.verdict == EDGE]:
        outermost = [result.arm(name) for name in [baseline.name, *(found.arm for found in edge)]]
        titles = [arm.title for arm in outermost if arm.edges]
        values = "value" if len(titles) == 1 else "values"
        parts.append(
            f"as far as it was tuned, {', '.join(_clauses(result, edge))}, but the best {values} of {listed(titles)} "
            f"{'is' if len(titles) == 1 else 'are'} the outermost tried, so that this is no verdict"
        )
    if missing:
        parts.append(f"{listed(missing)} {_were(missing)} not judged")
    if unpaired := [arm.title for arm in others if arm.loss is not None]:
        parts.append(f"{listed(unpaired)} {_were(unpaired)} judged with no seed of the baseline")
    return f"Beside {listed([baseline.title])}, {'; '.join(parts)}."


def verdict_as_tuned(result: StudyResult, found: ComparisonResult) -> Verdict:
    """The verdict of a comparison, were no best value outermost."""
    return verdict_of(found.estimate, found.difference_p, within_margin(result, found), result.alpha)


def within_margin(result: StudyResult, found: ComparisonResult) -> bool:
    """Whether the difference was shown to be smaller than the margin."""
    return found.equivalence_p is not None and found.equivalence_p < result.alpha


def best_first(comparisons: Sequence[ComparisonResult]) -> list[ComparisonResult]:
    """Comparisons in the order of their differences."""
    return sorted(comparisons, key=lambda found: found.estimate)


def judged_often(judged: Mapping[str, int]) -> str:
    """How often rows have judged, in words.

    Args:
        judged: models by the study or comparison that judged them on these rows.
    """
    times = f"{len(judged)} studies or comparisons" if len(judged) > 1 else "1 study or comparison"
    return f"these judging rows have judged {sum(judged.values())} models in {times} here"


def listed(titles: Sequence[str]) -> str:
    """Titles in quotation marks, shortened, the last one behind `and`."""
    quoted = [f"“{shortened(title)}”" for title in titles]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text from a user on one line, cut where it has more characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def _clauses(result: StudyResult, comparisons: Sequence[ComparisonResult]) -> list[str]:
    """What is said of arms with the same verdict."""
    found: dict[tuple[Verdict, bool], list[ComparisonResult]] = {}
    for comparison in best_first(comparisons):
        verdict = verdict_as_tuned(result, comparison)
        found.setdefault((verdict, within_margin(result, comparison)), []).append(comparison)
    ordered = sorted(found, key=lambda group: (ORDER.index(group[0]), group[1]))
    return [_clause(result, group[0], group[1], found[group]) for group in ordered]


def _clause(result: StudyResult, verdict: Verdict, within: bool, comparisons: Sequence[ComparisonResult]) -> str:
    titles = [result.arm(comparison.arm).title for comparison in comparisons]
    names, one = listed(titles), len(titles) == 1
    match verdict:
        case Verdict.BETTER | Verdict.WORSE:
            by = f" by less than {result.margin:g} nats" if within else ""
            return f"{names} {'is' if one else 'are'} {verdict}{by}"
        case Verdict.EQUIVALENT:
            return f"{names} {'is' if one else 'are'} equivalent within {result.margin:g} nats"
        case Verdict.UNDECIDED:
            return f"it cannot be told whether {names} {'differs' if one else 'differ'}"
        case _:
            seeds = max(comparison.seeds for comparison in comparisons)
            return f"there are too few seeds to judge {names} ({seeds}, and a verdict needs {FEWEST_SEEDS})"


def _were(titles: Sequence[str]) -> str:
    return "was" if len(titles) == 1 else "were"
