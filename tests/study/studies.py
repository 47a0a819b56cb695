"""Studies whose jobs are written down instead of trained: what tuning and judging make of given losses."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmoe.config.run import RunConfig
from lmoe.config.study import ArmConfig, JudgingConfig, LongerConfig, StudyConfig, TimingConfig, TuningConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.evaluate.row_losses import COLUMNS
from lmoe.report.summary import RunSummary
from lmoe.study.arms import arms_of
from lmoe.study.jobs import DIVERGED, FAILURE_FILE, ROWS_FILE, Job, write_job
from lmoe.study.study import Study, Tools

DOMAINS = ("code", "math")
ROWS = 30
HERE = "a machine"
Loss = Callable[[Job], float]


def config(**changes: Any) -> StudyConfig:
    """Two arms with a learning rate each, two seeds of tuning and three of judging."""
    usual: dict[str, Any] = {
        "name": "micro",
        "baseline": "plain",
        "arms": {"plain": ArmConfig(overrides=["moe=soft"]), "other": ArmConfig(overrides=["moe=sigmoid"])},
        "space": {"optim": {"lr": [0.001, 0.002, 0.004]}},
        "tuning": TuningConfig(),
        "judging": JudgingConfig(seeds=[0, 1, 2]),
        "longer": LongerConfig(),
        "timing": TimingConfig(steps=0),
    }
    return StudyConfig(**(usual | changes))


def study_of(config: StudyConfig, folder: Path, *, max_steps: int = 10, max_epochs: float | None = None) -> Study:
    """The study, in a folder."""
    run = RunConfig(trainer=TrainerConfig(max_steps=max_steps, max_epochs=max_epochs))
    return Study(
        config=config,
        given=("logger=none",),
        folder=folder,
        arms=arms_of(config, ["logger=none"]),
        configs=dict.fromkeys(config.arms, run),
        domains=list(DOMAINS),
        command="lmoe study study=micro",
    )


@dataclass
class Written:
    """A launcher that writes down what jobs would have left.

    Args:
        folder: of the study.
        loss: of a job; an ArithmeticError in it is a job that fails, an OverflowError one that diverges.
        launched: labels of all jobs, in their order.
    """

    folder: Path
    loss: Loss
    launched: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __call__(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            write_job(job, self.folder)
            place = self.folder / job.place
            self.launched.append(job.label + (" longer" if job.is_longer else ""))
            try:
                loss = self.loss(job)
            except OverflowError:
                failure = {"exit_code": 3, "reason": "a loss is not finite", DIVERGED: True}
                (place / FAILURE_FILE).write_text(json.dumps(failure))
                continue
            except ArithmeticError:
                (place / FAILURE_FILE).write_text('{"exit_code": 1, "reason": "no memory"}')
                continue
            for run in job.runs:
                write_summary(place / run.folder, loss)
            if job.judging is not None:
                write_rows(place / ROWS_FILE, loss)

    @property
    def tools(self) -> Tools:
        """What a study asks for."""
        return Tools(launch=self, alone=lambda settings, folder: 1, say=self.said.append, parallel=1, machine=HERE)


def write_summary(run: Path, loss: float) -> None:
    """The summary of a finished run whose validation loss is the same in all domains."""
    RunSummary(
        name="x",
        run_dir=str(run),
        domains=list(DOMAINS),
        before=dict.fromkeys(DOMAINS, 3.0),
        after=dict.fromkeys(DOMAINS, loss),
        site_load={},
        domain_load={},
        coactivation={},
        knock_out={},
        specialisation={},
        phases={"joint": 0},
        max_steps=10,
        seconds=1.0,
        peak_memory_mb=100.0,
        trainable_parameters=1,
        backbone="micro",
        collapsed=[],
    ).to_json(run / "report" / "summary.json")


def write_rows(file: Path, loss: float, *, rows: int = ROWS) -> None:
    """Rows of two label tokens each, in turns of one domain and the other."""
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(
            (f"{i:016x}", DOMAINS[i % 2], "f" * 16, 2, repr(2 * loss + 0.01 * (i % 7))) for i in range(rows)
        )
