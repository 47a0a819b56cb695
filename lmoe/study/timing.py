"""Seconds a step of each arm: alone on the machine, the arms in turns, so that its moods fall on all of them alike."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lmoe.errors import LmoeError
from lmoe.report.curves import read_metrics
from lmoe.rules.study import setting_key
from lmoe.run.provenance import provenance_records
from lmoe.study.arms import Arm, Values, value_settings
from lmoe.study.jobs import finished

TIMING = "timing"
"""Folder of the timed runs."""
LEFT_OUT = 2
"""First steps, which warm up what is slow once."""
SHORT = (
    "logger=none",
    "trainer.max_epochs=null",
    "trainer.val_every_n_steps=0",
    "trainer.log_every_n_steps=1",
    "data.val_rows_per_domain=1",
    "checkpoint.every_n_steps=0",
    "analysis.knock_out=none",
)
"""Settings of a timed run, behind its own."""
Alone = Callable[[Sequence[str], Path], int]
"""Trains with settings into a folder, in a process of its own; returns its exit code."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ArmTiming:
    """How fast an arm trains.

    Args:
        seconds: of a step: the median over the steps of each turn.
        tokens_per_step: valid tokens, on average.
    """

    seconds: tuple[float, ...]
    tokens_per_step: float

    @property
    def median(self) -> float:
        """Seconds of a step, the median over the turns."""
        return median(self.seconds)


def time_arms(
    arms: Mapping[str, Arm],
    values: Mapping[str, Values],
    folder: Path,
    *,
    steps: int,
    repeats: int,
    alone: Alone,
    note: Callable[[str], None],
    has_time: Callable[[], bool],
) -> dict[str, ArmTiming]:
    """Time the arms in turns; an arm whose run fails is left out.

    Args:
        arms, values: by name; the first domain's run stands for an arm that trains apart.
        folder: of the study.
        steps: timed in a turn, after LEFT_OUT others.
        repeats: turns.
        note: told which arm is left out, and why.
        has_time: asked before each turn that is not done yet; where not, there are no more.
    """
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, list[float]] = {}
    failed: set[str] = set()
    for repeat in range(repeats):
        turn = {name: folder / TIMING / name / f"turn_{repeat}" for name in values if name not in failed}
        if any(_timed(place, values[name]) is None for name, place in turn.items()) and not has_time():
            break
        for name, chosen in values.items():
            if name in failed:
                continue
            place = turn[name]
            if _timed(place, chosen) is None:
                shutil.rmtree(place, ignore_errors=True)
                own = [text for text in arms[name].settings if setting_key(text).split(".")[0] != "logger"]
                short = [*own, *value_settings(chosen), *SHORT, f"trainer.max_steps={steps + LEFT_OUT}"]
                if alone(short, place):
                    note(f"{name}: not timed, its short run failed; see {place}")
                    failed.add(name)
                    continue
            if (timed := _timed(place, chosen)) is None:
                note(f"{name}: not timed, its short run has left no throughput; see {place}")
                failed.add(name)
                continue
            seconds.setdefault(name, []).append(timed[0])
            tokens.setdefault(name, []).append(timed[1])
    return {
        name: ArmTiming(seconds=tuple(found), tokens_per_step=sum(tokens[name]) / len(tokens[name]))
        for name, found in seconds.items()
        if name not in failed
    }


def _timed(place: Path, values: Values) -> tuple[float, float] | None:
    """Median seconds of a step of a short run, and its mean tokens; None: not done with these values, or damaged."""
    try:
        if finished(place) is None or not _had(place, values):
            return None
        metrics = read_metrics(place / "metrics.csv", lambda name: name.startswith("throughput/"))
    except LmoeError:
        return None
    counted, rates = (dict(metrics.get(f"throughput/{kind}", [])) for kind in ("tokens", "tokens_per_second"))
    timed = [step for step in counted if step > LEFT_OUT and rates.get(step)]
    if not timed:
        return None
    return median(counted[step] / rates[step] for step in timed), sum(counted[step] for step in timed) / len(timed)


def _had(run: Path, values: Values) -> bool:
    """Whether a run had these values, as far as it has recorded its command."""
    record = next(iter(provenance_records(run)[-1:]), None)
    if record is None:
        return True
    command = record.get("command", [])
    return _by_key(value_settings(values)).items() <= _by_key([str(word) for word in command]).items()


def _by_key(settings: Sequence[str]) -> dict[str, str]:
    return {setting_key(text): text.partition("=")[2] for text in settings}
