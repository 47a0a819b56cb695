"""The statistics of a study with Python loops over seeds, rows and domains, so that nobody can doubt them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

Table = Sequence[Sequence[float]]
"""A line a seed, a column a row."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure(losses: Sequence[float], tokens: Sequence[float], domains: Sequence[str]) -> float:
    """Mean over domains of summed loss over summed tokens, of one model."""
    values = []
    for domain in dict.fromkeys(domains):
        rows = [r for r in range(len(tokens)) if domains[r] == domain]
        values.append(sum(losses[r] for r in rows) / sum(tokens[r] for r in rows))
    return mean(values)


@dataclass
class Anova:
    """Mean squares of the two-way layout without replicates."""

    seeds: float
    rows: float
    rest: float


def anova(table: Table) -> Anova:
    S, N = len(table), len(table[0])
    grand = mean([value for line in table for value in line])
    of_seed = [mean(line) for line in table]
    of_row = [mean([line[r] for line in table]) for r in range(N)]
    seeds = N * sum((value - grand) ** 2 for value in of_seed)
    rows = S * sum((value - grand) ** 2 for value in of_row)
    rest = sum((table[s][r] - of_seed[s] - of_row[r] + grand) ** 2 for s in range(S) for r in range(N))
    return Anova(seeds=seeds / (S - 1), rows=rows / (N - 1), rest=rest / ((S - 1) * (N - 1)))


@dataclass
class Parts:
    """What each mean square says of the variance of the estimate: A, B and C of lmoe/statistics/crossed.py."""

    estimate: float
    of_seeds: float
    of_rows: float
    of_rest: float
    row_df: float


def crossed_parts(delta: Table, tokens: Sequence[float], domains: Sequence[str]) -> Parts:
    S = len(delta)
    names = list(dict.fromkeys(domains))
    by_seed = [measure(line, tokens, domains) for line in delta]
    estimate = mean(by_seed)
    of_seeds = sum((value - estimate) ** 2 for value in by_seed) / (S - 1) / S
    of_rows = of_rest = below = 0.0
    for name in names:
        rows = [r for r in range(len(tokens)) if domains[r] == name]
        total = sum(tokens[r] for r in rows)
        mean_tokens = total / len(rows)
        e = []
        for line in delta:
            ratio = sum(line[r] for r in rows) / total
            e.append([(line[r] - ratio * tokens[r]) / mean_tokens for r in rows])
        row_squares = rest_squares = 0.0
        for column, r in enumerate(rows):
            left = 1 - tokens[r] / total
            middle = mean([line[column] for line in e])
            row_squares += middle**2 / left
            rest_squares += sum((line[column] - middle) ** 2 for line in e) / left
        size = len(rows) ** 2 * len(names) ** 2
        of_rows += row_squares / size
        of_rest += rest_squares / size / (S - 1) / S
        df = (1 - 1 / len(rows)) / sum((tokens[r] / total) ** 2 for r in rows)
        below += (row_squares / size) ** 2 / df
    return Parts(estimate=estimate, of_seeds=of_seeds, of_rows=of_rows, of_rest=of_rest, row_df=of_rows**2 / below)


def two_one_sided_tests(estimate: float, standard_error: float, df: float, margin: float) -> float:
    """The larger p value of the two one-sided t tests against -margin and +margin."""
    above_low = stats.t.sf((estimate + margin) / standard_error, df)
    below_high = stats.t.cdf((estimate - margin) / standard_error, df)
    return max(above_low, below_high)


def holm(p_values: Sequence[float]) -> list[float]:
    """The least alpha at which the step-down procedure rejects each, found claim by claim."""
    adjusted = []
    for own in range(len(p_values)):
        needed = 0.0
        for number, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            needed = max(needed, (len(p_values) - number) * p_values[index])
            if index == own:
                break
        adjusted.append(min(1.0, needed))
    return adjusted


def critical(tail: float, share: float, seed_df: float, row_df: float) -> float:
    """The power mean of order 3 of two squared t values."""
    z, t = stats.t.isf(tail, row_df), stats.t.isf(tail, seed_df)
    return math.pow((1 - share**3) * z**6 + share**3 * t**6, 1 / 6)
