"""What a study has so far, and the time that is left to it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmoe.study.arms import Arm
from lmoe.study.jobs import Job
from lmoe.study.timing import ArmTiming
from lmoe.study.tuning import Chosen


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a study has so far.

    Args:
        arms: with their spaces as they are now.
        chosen: by arm; of an arm without a space its only values.
        tuning_seeds: with which values were chosen; empty: none were compared.
        judged: jobs that judge, by arm, in the order of the seeds.
        longer: the same of the longer runs.
        timings: by arm.
        notes: what a reader has to know of how it was done.
        deadline: on the monotonic clock; None: there is none.
    """

    arms: dict[str, Arm]
    chosen: dict[str, Chosen] = field(default_factory=dict)
    tuning_seeds: Sequence[int] = ()
    judged: dict[str, list[Job]] = field(default_factory=dict)
    longer: dict[str, list[Job]] = field(default_factory=dict)
    timings: dict[str, ArmTiming] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    deadline: float | None = None

    def note(self, text: str, say: Callable[[str], None]) -> None:
        """Say something that a reader of the result has to know too."""
        self.notes.append(text)
        say(text)

    @property
    def time_left(self) -> float:
        """Seconds; infinity without a deadline."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()
