"""Values drawn by Optuna's TPE (Bergstra 2011, NeurIPS): ask for some, tell what came of them, and prune what falls
behind. Each arm has a study of Optuna's, kept in a journal in the folder of the study.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmoe.errors import StudyError
from lmoe.study.arms import Arm, Values

if TYPE_CHECKING:
    import optuna

FOLDER = "optuna"
DIGITS = 4
"""Of a value that was drawn."""
AT_EDGE = 0.02
"""Share of the range within which a value counts as outermost."""
LOWER, UPPER = "lower", "upper"
"""Sides on which a value may be outermost."""


def check_installed() -> None:
    """Refuse to draw values without Optuna.

    Raises:
        StudyError: it is not installed.
    """
    if find_spec("optuna") is None:
        raise StudyError(
            "study.tuning.sampler=tpe needs Optuna, which is not installed: pip install 'lmoe[study]', or use grid"
        )


def opened(arm: str, folder: Path, *, tries: int, several_keys: bool, begun: int = 0) -> "optuna.Study":
    """Optuna's study of an arm, as far as it is.

    Args:
        folder: of the study.
        begun: tries that there are, so that a study that goes on does not draw the same once more.
        tries: of the arm; the first third are drawn at random.
        several_keys: whether more than one key is tuned, which are then drawn together.

    Raises:
        StudyError: its journal cannot be used.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / FOLDER / f"{arm}.log"
    seed = int.from_bytes(hashlib.sha256(f"{arm} {begun}".encode()).digest()[:4], "big")
    startup = max(2, tries // 3)
    sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, multivariate=several_keys or None)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # NOTE its lock links to this very path: to a relative one it leads nowhere, and after a kill is never freed.
        journal = JournalFileBackend(str(file.resolve()))
        return optuna.create_study(
            storage=JournalStorage(journal),
            study_name=arm,
            sampler=sampler,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=startup),
            direction="minimize",
            load_if_exists=True,
        )
    except Exception as error:  # whatever Optuna makes of a damaged file
        raise StudyError(
            f"{file} cannot be used ({type(error).__name__}: {error}); remove it, and values of {arm} are drawn anew"
        ) from None


class ArmSampler:
    """Draws the values of one arm.

    Args:
        arm: with the least and the largest value of each key, and whatever between.
        tries: how many are drawn.
        folder: of the study.
    """

    def __init__(self, arm: Arm, tries: int, folder: Path) -> None:
        self.arm, self.tries = arm, tries
        several = len(arm.space) > 1
        begun = len(opened(arm.name, folder, tries=tries, several_keys=several).get_trials(deepcopy=False))
        self.study = opened(arm.name, folder, tries=tries, several_keys=several, begun=begun)
        self._left: set[int] = set()

    def ask(self) -> tuple[int, Values] | None:
        """The number and the values of the next try: one that was asked for and never told of, or a new one; None: all
        have been told of, or were left."""
        import optuna

        study = self.study
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            if trial.number in self._left:
                continue
            if self._is_drawn(trial.params):
                return trial.number, self._values(trial.params)
            self.tell(trial.number, None)
        if len(self.all_values()) >= self.tries:
            return None
        trial = study.ask({key: _distribution(values) for key, values in self.arm.space.items()})
        return trial.number, self._values(trial.params)

    def tell(self, number: int, score: float | None, *, pruned: bool = False) -> None:
        """What came of a try; None: its runs have no score, or were pruned."""
        import optuna

        states = optuna.trial.TrialState
        state = states.COMPLETE if score is not None else states.PRUNED if pruned else states.FAIL
        self.study.tell(number, score, state=state)

    def leave(self, number: int) -> None:
        """Ask for a try no more in this process: its runs have failed, and may do better at the next start."""
        self._left.add(number)

    def all_values(self) -> list[Values]:
        """The values of all tries, in their order."""
        every = self.study.get_trials(deepcopy=False)
        return [self._values(trial.params) for trial in every if self._is_drawn(trial.params)]

    def edges(self, values: Values) -> dict[str, str]:
        """Keys whose value lies at the end of its range."""
        return {key: side for key, value in values if (side := _side(value, self.arm.space[key])) is not None}

    def _is_drawn(self, params: Mapping[str, Any]) -> bool:
        """Whether a try has a value of each key: one that was killed while it was asked for has none."""
        return all(key in params for key in self.arm.space)

    def _values(self, params: Mapping[str, Any]) -> Values:
        return tuple((key, _rounded(params[key])) for key in self.arm.space)


def _distribution(values: Sequence[Any]) -> Any:
    """A distribution from the least to the largest value: of whole numbers where all are, by ratios where all are above
    0."""
    import optuna

    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values):
        return optuna.distributions.IntDistribution(low, high, log=low > 0)
    return optuna.distributions.FloatDistribution(float(low), float(high), log=low > 0)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _side(value: float, values: Sequence[float]) -> str | None:
    low, high = min(values), max(values)
    if low == high:
        return None
    share = math.log(value / low) / math.log(high / low) if low > 0 else (value - low) / (high - low)
    return LOWER if share < AT_EDGE else UPPER if share > 1 - AT_EDGE else None


@dataclass(slots=True, frozen=True, kw_only=True)
class Watch:
    """What a job is watched for while it runs, so that it can be pruned.

    Args:
        arm: whose study of Optuna decides.
        trial: number of the try in it.
        tries: of the arm.
        several_keys: whether more than one key is tuned.
        from_step: first optimizer step of the last phase: before it nothing is reported.
        metric: `mean`, or a metric that validations log.
    """

    arm: str
    trial: int
    tries: int
    several_keys: bool
    from_step: int
    metric: str


def should_prune(watch: Watch, folder: Path, reported: set[int], scores: Mapping[int, float]) -> bool:
    """Report what validations have found since the last call, and ask whether the try falls behind the median.

    Args:
        folder: of the study.
        reported: steps that were reported; grows.
        scores: by step, of validations.
    """
    import optuna

    study = opened(watch.arm, folder, tries=watch.tries, several_keys=watch.several_keys)
    trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[watch.trial]._trial_id)
    for step, score in sorted(scores.items()):
        if step >= watch.from_step and step not in reported:
            reported.add(step)
            trial.report(score, step)
    return bool(reported) and bool(trial.should_prune())
