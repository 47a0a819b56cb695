"""Studies with known effects, drawn by the thousand, and how often what lmoe/study says of them is right.

A study is drawn from delta[s, r] = t_r (mu + S_s + R_r + E_sr) and judged by the functions of lmoe/study themselves.
Shapes: B studies at once, K arms, S seeds, N rows, D domains.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmoe.statistics.bootstrap import bootstrap_interval
from lmoe.statistics.crossed import CrossedEstimate, crossed_estimate
from lmoe.statistics.crossed_t import critical
from lmoe.statistics.inference import equivalence_p, half_width, interval, smallest_effect
from lmoe.statistics.strata import Floats, Strata

LEVEL, POWER = 0.95, 0.8
ARMS, LEARNING_RATES = 12, 20
NUMBERS_AT_ONCE = 4_000_000
"""Random numbers held in memory at the same time."""
FAR = 8.0
"""Standard errors from 0 to a margin whose other side no estimate comes near."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a share must lie within."""

    least: float
    most: float

    def holds(self, value: float) -> bool:
        """Whether it does."""
        return self.least <= value <= self.most


def bounds(seeds: int) -> dict[str, Bound]:
    """Returns bounds by the name of a share; shares without a bound are shown only."""
    slack = 0.03 if seeds == 3 else 0.02
    return {
        "false_alarms": Bound(least=0.035, most=0.065),
        "covered": Bound(least=0.95 - slack, most=0.95 + slack),
        "found": Bound(least=0.76, most=0.84),
        "false_equivalence": Bound(least=0.0, most=0.065),
        "family": Bound(least=0.0, most=0.065),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The rows that studies are judged on.

    Args:
        domains: least and most rows of each of the D domains.
        token_spread: standard deviation of the log of a row's label tokens; 0 gives every row the same.
        heavy: whether row effects are t with 4 degrees of freedom in place of normal.
    """

    name: str
    domains: tuple[tuple[int, int], ...]
    token_spread: float
    heavy: bool

    def strata(self, generator: np.random.Generator) -> Strata:
        """Draw the rows of some studies."""
        rows = [int(generator.integers(least, most + 1)) for least, most in self.domains]
        names = [f"domain {number}" for number, count in enumerate(rows) for _ in range(count)]
        tokens = np.ceil(100 * np.exp(self.token_spread * generator.standard_normal(len(names))))
        return Strata.of_rows(tokens, names)

    def row_effects(self, shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
        """Effects of variance 1."""
        if self.heavy:
            return generator.standard_t(4, shape) / np.sqrt(2)
        return generator.standard_normal(shape)


DESIGNS = (
    Design(name="4 domains of 60 rows, same tokens, normal", domains=((60, 60),) * 4, token_spread=0, heavy=False),
    Design(name="8 domains of 200 to 300 rows", domains=((200, 300),) * 8, token_spread=0.8, heavy=True),
    Design(name="2 domains of 40 rows", domains=((40, 40),) * 2, token_spread=0.8, heavy=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How large the effects are.

    Args:
        seed: standard deviation of the seed part of an estimate over that of its row part.
        rest: standard deviation of E_sr over that of R_r.
    """

    seed: float
    rest: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """B studies of the same rows.

    Args:
        models: (B, K, S, N) loss sums of each arm; or one arm less the baseline with K = 1.
        row_variance: of the row part of the measure's mean over seeds.
        noise: they were drawn with.
    """

    strata: Strata
    models: Floats
    row_variance: float
    noise: Noise

    @property
    def truth(self) -> CrossedEstimate:
        """What a study would state that knew the variances."""
        seeds, row = self.models.shape[-2], self.row_variance
        rest = row * self.noise.rest**2 / seeds
        of_seeds = row * self.noise.seed**2 + rest
        return CrossedEstimate(
            estimate=np.array(0.0),
            standard_error=np.sqrt(of_seeds + row),
            seed_part=np.array(of_seeds - rest),
            row_part=np.array(row),
            rest_part=np.array(rest),
            seed_share=np.array(of_seeds / (of_seeds + row)),
            seed_df=seeds - 1,
            row_df=self.strata.rows.sum() - len(self.strata.names),
        )


def draw(
    design: Design, noise: Noise, seeds: int, studies: int, arms: int, generator: np.random.Generator
) -> Iterator[Drawn]:
    """So many studies without any true effect, some at a time, each time on other rows."""
    left = studies
    while left:
        strata = design.strata(generator)
        rows = strata.tokens.size
        count = min(left, max(1, NUMBERS_AT_ONCE // (arms * seeds * rows)), -(-studies // 20))
        left -= count
        squares = (strata.tokens**2) @ strata.member / strata.domain_tokens**2
        row_variance = float(squares.sum()) / len(strata.names) ** 2
        seed_effects = noise.seed * np.sqrt(seeds * row_variance) * generator.standard_normal((count, arms, seeds, 1))
        models = noise.rest * generator.standard_normal((count, arms, seeds, rows))
        models += design.row_effects((count, arms, 1, rows), generator)
        models += seed_effects
        models *= strata.tokens
        yield Drawn(strata=strata, models=models, row_variance=row_variance, noise=noise)


def share(design: Design, noise: Noise, seeds: int, studies: int, generator: np.random.Generator) -> dict[str, float]:
    """Returns shares of studies with one comparison, by name:

    false_alarms: a difference called at 5 % where there is none,
    covered: the interval of 95 % holds the true difference, here three standard errors from 0,
    found: a difference of the size that the study itself states as the smallest one, called,
    found_planned: the same of the size that a study states that knows the variances,
    false_equivalence: a difference as large as the margin, called smaller than it,
    student: as false_alarms, by Student's t with Satterthwaite's degrees of freedom and the part of seeds cut off at 0.
    """
    counts = dict.fromkeys(("false_alarms", "covered", "found", "found_planned", "false_equivalence", "student"), 0.0)
    for drawn in draw(design, noise, seeds, studies, 1, generator):
        of, truth = crossed_estimate(drawn.models[:, 0], drawn.strata), drawn.truth
        width = half_width(of, 1 - LEVEL)
        counts["false_alarms"] += np.count_nonzero(np.abs(of.estimate) > width)
        effect = 3 * truth.standard_error
        low, high = interval(_moved(of, effect), LEVEL)
        counts["covered"] += np.count_nonzero((low <= effect) & (effect <= high))
        counts["found"] += np.count_nonzero(np.abs(of.estimate + smallest_effect(of, 1 - LEVEL, POWER)) > width)
        planned = smallest_effect(truth, 1 - LEVEL, POWER)
        counts["found_planned"] += np.count_nonzero(np.abs(of.estimate + planned) > width)
        margin = float(FAR * truth.standard_error)
        counts["false_equivalence"] += np.count_nonzero(equivalence_p(_moved(of, margin), margin) < 1 - LEVEL)
        counts["student"] += np.count_nonzero(np.abs(of.estimate) > _student_width(of))
    return {name: float(count) / studies for name, count in counts.items()}


def family_share(design: Design, noise: Noise, seeds: int, studies: int, generator: np.random.Generator) -> float:
    """Share of studies of twelve arms with one baseline that call some arm better or worse where none is.

    Holm's procedure calls a true no-difference, if any, for the smallest p value: where p is below 5 %/12.
    """
    called = 0
    for drawn in draw(design, noise, seeds, studies, ARMS + 1, generator):
        of = crossed_estimate(drawn.models[:, 1:] - drawn.models[:, :1], drawn.strata)
        called += np.count_nonzero((np.abs(of.estimate) > half_width(of, (1 - LEVEL) / ARMS)).any(-1))
    return float(called / studies)


def bootstrap_share(
    design: Design, noise: Noise, seeds: int, studies: int, draws: int, generator: np.random.Generator
) -> float:
    """Share of studies whose interval by resampling leaves the true difference out, at 95 %."""
    missed = 0
    for drawn in draw(design, noise, seeds, studies, 1, generator):
        for number, delta in enumerate(drawn.models[:, 0]):
            low, high = bootstrap_interval(delta, drawn.strata, level=LEVEL, draws=draws, seed=number)
            missed += not low <= 0 <= high
    return missed / studies


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What choosing the best of several learning rates does to the estimate of it, where all are the baseline's equal.

    Args:
        bias: mean estimate, in true standard errors; 0 is right, below 0 too good.
        better: share of studies that call the chosen one better than the baseline; half of 5 % is right.
    """

    bias: float
    better: float


def selection(
    design: Design, noise: Noise, seeds: int, studies: int, generator: np.random.Generator
) -> dict[str, Selection]:
    """The best of 20, chosen on the judging rows, and on other rows with other seeds; judged alike."""
    estimates: dict[str, list[Floats]] = {"judging rows": [], "other rows and seeds": []}
    called = dict.fromkeys(estimates, 0.0)
    judging = draw(design, noise, seeds, studies, LEARNING_RATES + 1, generator)
    for drawn in judging:
        count = drawn.models.shape[0]
        of = crossed_estimate(drawn.models[:, 1:] - drawn.models[:, :1], drawn.strata)
        elsewhere = np.concatenate(
            [
                crossed_estimate(other.models, other.strata).estimate
                for other in draw(design, noise, seeds, count, LEARNING_RATES, generator)
            ]
        )
        width = half_width(of, 1 - LEVEL)
        for name, chosen in (("judging rows", of.estimate.argmin(-1)), ("other rows and seeds", elsewhere.argmin(-1))):
            which = np.arange(count), chosen
            estimates[name].append(of.estimate[which] / (np.sqrt(2) * drawn.truth.standard_error))
            called[name] += float(np.count_nonzero(of.estimate[which] < -width[which]))
    return {
        name: Selection(bias=float(np.concatenate(values).mean()), better=called[name] / studies)
        for name, values in estimates.items()
    }


def _moved(of: CrossedEstimate, by: Floats | float) -> CrossedEstimate:
    """The same study of a difference that is larger by so much."""
    return CrossedEstimate(
        estimate=of.estimate + by,
        standard_error=of.standard_error,
        seed_part=of.seed_part,
        row_part=of.row_part,
        rest_part=of.rest_part,
        seed_share=of.seed_share,
        seed_df=of.seed_df,
        row_df=of.row_df,
    )


def _student_width(of: CrossedEstimate) -> Floats:
    """Half width by Student's t, of the parts cut off at 0, each with its degrees of freedom."""
    variance = of.seed_part + of.row_part + of.rest_part
    seeds = np.minimum(of.seed_share * of.standard_error**2, variance)
    df = variance**2 / (seeds**2 / of.seed_df + (variance - seeds) ** 2 / of.row_df)
    return np.sqrt(variance) * critical((1 - LEVEL) / 2, 0.0, 1, df)
