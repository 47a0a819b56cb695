"""The jobs of a study: each trains one arm with one seed, and some judge what was trained; kept as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lmoe.errors import CheckpointError, LmoeError, StudyError
from lmoe.files.run_folder import PROVENANCE_FILE, SUMMARY_FILE, hydra_quoted
from lmoe.files.small_file import Reader
from lmoe.files.write import write_whole
from lmoe.report.summary import FINISHED, SUMMARY, RunSummary
from lmoe.rules.study import by_key, setting_key
from lmoe.rules.trust import TRUST
from lmoe.study.arms import Arm, Values, value_settings, values_text
from lmoe.study.sampling import Watch

JOB_FILE, FAILURE_FILE, ROWS_FILE, LOG_FILE = "job.json", "failed.json", "judged_rows.csv", "job.log"
PRUNED_FILE = "pruned"
SECONDS_FILE = "seconds.json"
"""How long a job took that was done in one go, on which machine, and how many ran beside one another."""
BASE_FILE = "base_rows.csv"
"""Losses of the base without adapters, in the folder of the study."""
PARTS = "domains"
"""Folder of the runs of a job that has one for each domain."""
DIVERGED = "diverged"
"""Key in FAILURE_FILE of what would fail once more: with a loss that is no finite number."""
DIVERGED_CODE = 3
"""Exit code of the process of such a job."""
RUNS, LONGER = "runs", "longer"
"""Folders of jobs, by what they are for."""
PLACES = "hydra.searchpath="
"""Setting that names folders of further choices."""
KEPT = Reader(error=StudyError, cure="remove the folder of this job, and it is done again", what="such a file")


@dataclass(slots=True, frozen=True, kw_only=True)
class JobRun:
    """One training run of a job.

    Args:
        folder: below that of the job; "": the same.
        domain: whose rows it is trained on; "": all.
        settings: of lmoe train, without the folder.
    """

    folder: str
    domain: str
    settings: tuple[str, ...]

    @property
    def trusts_code(self) -> bool:
        """Whether its command says that Python which comes with its base may run."""
        said = [text.partition("=")[2].lower() for text in self.settings if setting_key(text) == TRUST]
        return said[-1:] == ["true"]


@dataclass(slots=True, frozen=True, kw_only=True)
class Judging:
    """How a job judges what it has trained.

    Args:
        rows_per_domain: the first ones; 0: all.
        batch_size: rows in a batch.
        more: paths of more rows, by the domain that they are called.
    """

    rows_per_domain: int
    batch_size: int
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, frozen=True, kw_only=True)
class Job:
    """One arm with one seed.

    Args:
        arm: its name.
        values: of the tuned keys.
        seed: of its runs.
        place: folder below that of the study.
        runs: one, or one for each domain.
        judging: None: a job of tuning, which looks at validation rows alone.
        watch: what prunes it; None: nothing.
    """

    arm: str
    values: Values
    seed: int
    place: str
    runs: tuple[JobRun, ...]
    judging: Judging | None
    watch: Watch | None = None

    @property
    def label(self) -> str:
        """The job in a line."""
        return f"{self.arm} {values_text(self.values)} seed {self.seed}"

    @property
    def is_longer(self) -> bool:
        """Whether its runs are the longer ones (study.longer)."""
        return Path(self.place).parts[0] == LONGER


def job_of(
    arm: Arm,
    values: Values,
    seed: int,
    *,
    study: str,
    domains: Sequence[str],
    max_steps: int | None,
    max_epochs: float | None = None,
    judging: Judging | None,
    longer: int = 1,
) -> Job:
    """The job of an arm with a seed.

    Args:
        seed: of the study; the arm's own offset is added to it.
        study: its name.
        domains: of the training rows, for an arm that trains apart.
        max_steps: of a run of the arm; None: it is as long as max_epochs makes it.
        max_epochs: of a run of the arm; None: max_steps counts.
        judging: None: nothing is judged.
        longer: factor of its length.
    """
    kind = RUNS if longer == 1 else LONGER
    place = f"{kind}/{arm.name}/{values_text(values)}/seed_{seed + arm.seed_offset}"
    own = [
        *arm.settings,
        *value_settings(values),
        f"seed={seed + arm.seed_offset}",
        f"name={hydra_quoted(f'study/{study}/{arm.name}/{values_text(values)}')}",
    ]
    share = len(domains) if arm.apart else 1
    if max_epochs is not None:  # of the rows of each domain, and so as long in sum
        length = [f"trainer.max_epochs={max_epochs * longer}"] if longer > 1 else []
    else:
        assert max_steps is not None, "a run has max_epochs or max_steps"
        length = [f"trainer.max_steps={-(-max_steps * longer // share)}"] if longer > 1 or arm.apart else []
    if not arm.apart:
        runs = (JobRun(folder="", domain="", settings=(*own, *length)),)
    else:
        runs = tuple(
            JobRun(
                folder=f"{PARTS}/{number:02d}",
                domain=domain,
                settings=(*own, *length, f"data.domains=[{hydra_quoted(domain)}]"),
            )
            for number, domain in enumerate(domains)
        )
    return Job(arm=arm.name, values=values, seed=seed, place=place, runs=runs, judging=judging)


def write_job(job: Job, folder: Path) -> None:
    """Write what a job is into its folder, and take away the mark of a failure.

    Args:
        folder: of the study.

    Raises:
        StudyError: another job was there.
        CheckpointError: the folder cannot be written.
    """
    place = folder / job.place
    text = json.dumps(asdict(job), indent=1)
    if (place / JOB_FILE).exists() and _trained(read_job(place)) != _trained(job):
        raise StudyError(
            f"{place}: it holds a job with other settings; remove it, or give the study another name (study.name)"
        )
    (place / FAILURE_FILE).unlink(missing_ok=True)
    write_whole(place, {JOB_FILE: text.encode() + b"\n"})


def _trained(job: Job) -> list[tuple[str, dict[str, str]]]:
    """What the runs of a job are, wherever their choices are read from and in whatever order they are set."""
    return [(run.folder, by_key([text for text in run.settings if not text.startswith(PLACES)])) for run in job.runs]


def read_job(place: Path) -> Job:
    """The job that was written into a folder.

    Raises:
        StudyError: it is damaged.
    """
    kept = KEPT.json(place / JOB_FILE)
    try:
        return Job(
            arm=kept["arm"],
            values=tuple((key, value) for key, value in kept["values"]),
            seed=kept["seed"],
            place=kept["place"],
            runs=tuple(JobRun(**run | {"settings": tuple(run["settings"])}) for run in kept["runs"]),
            judging=None if kept["judging"] is None else Judging(**kept["judging"]),
            watch=None if kept.get("watch") is None else Watch(**kept["watch"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KEPT.refusal(place / JOB_FILE, f"holds something else ({error})") from None


def begun_jobs(folder: Path) -> list[Job]:
    """The jobs of a study that were begun, whatever came of them: those of longer runs last, the seeds in their order.

    Args:
        folder: of the study.

    Raises:
        StudyError: the file of one is damaged.
    """
    jobs = []
    for kind in (RUNS, LONGER):
        found = [read_job(file.parent) for file in folder.glob(f"{kind}/*/*/*/{JOB_FILE}")]
        jobs += sorted(found, key=lambda job: (*Path(job.place).parts[:-1], job.seed))
    return jobs


def finished(run: Path) -> RunSummary | None:
    """The summary of a run that has done all its steps; None: it has not, or its summary is damaged, so that it goes
    on from its last checkpoint.

    Keys of a later version are passed over: all runs of a study are measured in nats a token, and none of these keys
    can make another loss of it.

    Raises:
        StudyError: the summary is whole, and of a version that this one cannot read: the run may have done its steps.
    """
    file = run / SUMMARY_FILE
    if not file.exists():
        return None
    try:
        content = SUMMARY.json(file)
    except CheckpointError:
        return None
    try:
        summary = RunSummary.from_content(content, file, pass_over_unknown=True)
    except CheckpointError as error:
        raise StudyError(
            f"{error}; go on with the version of lmoe that has written it ({PROVENANCE_FILE} names it), or {KEPT.cure}"
        ) from None
    return summary if summary.ended == FINISHED else None


def is_done(job: Job, folder: Path) -> bool:
    """Whether all of a job is there.

    Args:
        folder: of the study.

    Raises:
        StudyError: as `finished`.
    """
    place = folder / job.place
    trained = all(finished(place / run.folder) is not None for run in job.runs)
    return trained and (job.judging is None or (place / ROWS_FILE).exists())


def check_begun(folder: Path) -> None:
    """Read what the jobs that were begun have left, so that what cannot be used is named before anything is launched.

    Args:
        folder: of the study.

    Raises:
        StudyError: names the file.
    """
    for job in begun_jobs(folder):
        for run in job.runs:
            finished(folder / job.place / run.folder)


def was_pruned(job: Job, folder: Path) -> bool:
    """Whether a job was ended because it fell behind.

    Args:
        folder: of the study.
    """
    return (folder / job.place / PRUNED_FILE).exists()


def failure_of(job: Job, folder: Path) -> str | None:
    """Why the last try of a job has failed, in a line; None: it has not."""
    file = folder / job.place / FAILURE_FILE
    if not file.exists():
        return None
    try:
        return str(KEPT.json(file).get("reason", "it failed"))
    except LmoeError:
        return f"it failed, and {file} cannot be read"


def has_diverged(job: Job, folder: Path) -> bool:
    """Whether a job has failed with a loss that is no finite number, as it would do once more.

    Args:
        folder: of the study.
    """
    file = folder / job.place / FAILURE_FILE
    try:
        return file.exists() and KEPT.json(file).get(DIVERGED) is True
    except LmoeError:  # it says no reason, and is done again
        return False


def seconds_of(folder: Path, *, machine: str, parallel: int) -> list[tuple[Job, float]]:
    """The jobs that are done, with the seconds that they took; what cannot be read is passed over, since only an
    estimate is made of it, and so is what was done elsewhere. Of a file that does not say where, it was here.

    Args:
        folder: of the study.
        machine: on which jobs run now.
        parallel: jobs that run beside one another now.
    """
    found = []
    for file in sorted(folder.glob(f"{RUNS}/*/*/*/{SECONDS_FILE}")):
        try:
            kept, job = KEPT.json(file), read_job(file.parent)
        except LmoeError:
            continue
        seconds = kept.get("seconds")
        here = (kept.get("machine", machine), kept.get("parallel", parallel)) == (machine, parallel)
        if here and isinstance(seconds, int | float):
            found.append((job, float(seconds)))
    return found
