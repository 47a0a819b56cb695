"""Results of studies that were never done, for the tests of what is made of a result."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmoe.statistics.verdict import FEWEST_SEEDS, Verdict
from lmoe.study.results.result import EDGE, ArmResult, ComparisonResult, Curve, StudyResult, TryResult

DOMAINS = ("code", "math", "poems")
RATES = (0.0005, 0.001, 0.002)
RATE = "optim.lr"
MARGIN = 0.01
HALF = 0.004
"""Half of an interval."""


def arm(name: str, loss: float | None, **changes: Any) -> ArmResult:
    """An arm whose best learning rate is the middle one, judged with three seeds; loss None: it failed."""
    usual: dict[str, Any] = {
        "name": name,
        "title": f"the arm {name}",
        "commands": [] if loss is None else [f"lmoe train moe={name} seed=0"],
        "space": {RATE: list(RATES)},
        "tries": tries(loss),
        "chosen": None if loss is None else {RATE: RATES[1]},
        "second": None if loss is None else {RATE: RATES[2]},
        "edges": {},
        "seeds": [] if loss is None else [0, 1, 2],
        "losses": [] if loss is None else [loss - 0.001, loss, loss + 0.001],
        "loss": loss,
        "domain_losses": {} if loss is None else dict.fromkeys(DOMAINS, loss),
        "total_parameters": 1000,
        "active_parameters": 250,
        "flops_per_token": 2e6,
        "steps": 100,
        "tokens_per_step": 64.0,
        "seconds_per_step": 0.25,
        "peak_memory_mb": 500.0,
        "classifier_accuracy": None,
        "curve": None if loss is None else curve(loss),
        "failures": [f"{name} seed 0: no memory"] if loss is None else [],
        "failed": loss is None,
    }
    return ArmResult(**(usual | changes))


def tries(loss: float | None) -> list[TryResult]:
    """Of two seeds, the middle rate the best; loss None: all of them failed."""
    if loss is None:
        return [TryResult(values={RATE: rate}, scores={}, mean=None) for rate in RATES]
    means = [loss + 0.05 * abs(i - 1) for i in range(len(RATES))]
    return [
        TryResult(values={RATE: rate}, scores={"100": mean - 0.01, "101": mean + 0.01}, mean=mean)
        for rate, mean in zip(RATES, means, strict=True)
    ]


def curve(loss: float) -> Curve:
    """From 3 nats above the loss to it, in 20 points."""
    steps = list(range(5, 101, 5))
    return Curve(steps=steps, loss=[loss + 3 * math.exp(-step / 15) for step in steps])


def comparison(
    name: str,
    estimate: float,
    verdict: str = Verdict.UNDECIDED,
    *,
    domain: str | None = None,
    seeds: int = 3,
    **changes: Any,
) -> ComparisonResult:
    """An arm beside the baseline, with p values that fit the verdict, and an interval where there are two seeds."""
    judged, spread = seeds >= FEWEST_SEEDS, seeds > 1
    usual: dict[str, Any] = {
        "arm": name,
        "domain": domain,
        "seeds": seeds,
        "estimate": estimate,
        "low": estimate - HALF if spread else None,
        "high": estimate + HALF if spread else None,
        "bootstrap_low": estimate - HALF if spread else None,
        "bootstrap_high": estimate + HALF if spread else None,
        "standard_error": HALF / 2 if spread else None,
        "df": 8.0 if spread else None,
        "difference_p": (0.001 if verdict in (Verdict.BETTER, Verdict.WORSE) else 0.4) if judged else None,
        "equivalence_p": (0.01 if verdict == Verdict.EQUIVALENT else 0.5) if judged else None,
        "smallest_effect": HALF if spread else None,
        "verdict": str(verdict) if judged else str(Verdict.TOO_FEW_SEEDS),
        "sentence": f"{verdict} in words" if judged else f"too few seeds: {seeds}, and a verdict needs {FEWEST_SEEDS}",
        "by_seed": [estimate + 0.002 * (i - (seeds - 1) / 2) for i in range(seeds)],
    }
    return ComparisonResult(**(usual | changes))


def result(arms: Sequence[ArmResult], primary: Sequence[ComparisonResult], **changes: Any) -> StudyResult:
    """A study of three domains, whose first arm is the baseline."""
    usual: dict[str, Any] = {
        "name": "made_up",
        "question": "Does it help?",
        "command": "lmoe study study=made_up",
        "finished": "2026-01-02T03:04:05+00:00",
        "versions": {"lmoe": "1.0", "peft": None},
        "machine": "a machine, 1 threads",
        "baseline": arms[0].name,
        "metric": "mean",
        "tuning_seeds": [100, 101],
        "margin": MARGIN,
        "alpha": 0.05,
        "judging_rows": 1234,
        "judging_tokens": 56789,
        "judging_digest": "0" * 16,
        "left_out": 0,
        "judged_before": {"made_up": 6, "another": 4},
        "domains": dict.fromkeys(DOMAINS, 400),
        "base_domain_losses": dict.fromkeys(DOMAINS, 3.5),
        "arms": list(arms),
        "primary": list(primary),
        "secondary": by_domain(primary),
        "longer_times": 1,
        "commands": {
            f"runs/{arm.name}/as_given/seed_{seed}": [f"lmoe train moe={arm.name} seed={seed}"]
            for arm in arms
            for seed in arm.seeds
        },
    }
    return StudyResult(**(usual | changes))


def by_domain(primary: Sequence[ComparisonResult]) -> list[ComparisonResult]:
    """Each comparison in each domain with the same difference and verdict."""
    return [
        comparison(found.arm, found.estimate, found.verdict, domain=domain, seeds=found.seeds)
        for found in primary
        for domain in DOMAINS
    ]


def usual_result(**changes: Any) -> StudyResult:
    """A baseline, and an arm of each verdict."""
    arms = [arm("plain", 2.0), arm("good", 1.9), arm("bad", 2.2), arm("same", 2.001), arm("unsure", 2.01)]
    primary = [
        comparison("good", -0.1, Verdict.BETTER),
        comparison("bad", 0.2, Verdict.WORSE),
        comparison("same", 0.001, Verdict.EQUIVALENT),
        comparison("unsure", 0.01),
    ]
    return result(arms, primary, **changes)


def bare_result() -> StudyResult:
    """Two arms with a seed each, nothing tuned, timed, or known."""
    absent = {"tries": [], "curve": None, "tokens_per_step": None, "seconds_per_step": None, "peak_memory_mb": None}
    arms = [arm("plain", 2.0, chosen={}, seeds=[0], **absent), arm("other", 2.1, chosen={}, seeds=[0], **absent)]
    return result(
        arms,
        [comparison("other", 0.1, seeds=1)],
        secondary=[],
        tuning_seeds=[],
        domains={"all": 10},
        base_domain_losses={},
        question="",
        judged_before={},
    )


def large_result(count: int = 16, *, seed: int = 0) -> StudyResult:
    """Many arms with differences as a study has them, longer runs of four, one that failed, two not timed."""
    random = np.random.default_rng(seed)
    differences = [0.0, *random.normal(0, 0.02, count - 3), -0.25, 0.08]
    names = [f"arm_{i}" for i in range(count)]
    arms = [
        arm(
            name,
            2.2 + difference,
            title=f"{name}: a way of fine-tuning"[: 12 + 3 * i],
            curve=_noisy(2.2 + difference, random),
            seconds_per_step=None if i % 7 == 3 else 0.2 + 0.01 * i,
            flops_per_token=1e6 * (1 + i % 4),
            edges={RATE: "upper"} if i == 5 else {},
        )
        for i, (name, difference) in enumerate(zip(names, differences, strict=True))
    ]
    arms[4] = arm(names[4], None, title="one that failed")
    primary = [
        comparison(name, difference, _verdict(difference), seeds=5)
        for name, difference in zip(names, differences, strict=True)
        if name not in (names[0], names[4])
    ]
    for of in primary:
        if of.arm == names[5]:
            of.sentence, of.verdict = f"{EDGE}: {of.sentence}, but the best value is the outermost", EDGE
    best = [arms[0], *sorted((of for of in arms[1:] if of.loss is not None), key=lambda of: of.loss or 0.0)[:3]]
    longer = [comparison(of.name, (of.loss or 0.0) - 2.2, Verdict.BETTER) for of in best[1:]]
    return result(arms, primary, longer_times=4, longer_arms=best, longer=longer)


def _noisy(loss: float, random: np.random.Generator) -> Curve:
    smooth = curve(loss)
    noise = random.normal(0, 0.03, len(smooth.loss))
    return Curve(
        steps=smooth.steps, loss=[value + float(error) for value, error in zip(smooth.loss, noise, strict=True)]
    )


def _verdict(difference: float) -> Verdict:
    if abs(difference) > 2 * HALF:
        return Verdict.BETTER if difference < 0 else Verdict.WORSE
    return Verdict.EQUIVALENT if abs(difference) + HALF < MARGIN else Verdict.UNDECIDED
