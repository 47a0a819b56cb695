"""One job of a study, in a process of its own: python -m lmoe.cli.study_job FOLDER."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from lmoe.cli.errors import with_keys
from lmoe.cli.threads import prepare_threads
from lmoe.cli.train import main as train
from lmoe.errors import LmoeError, StudyError
from lmoe.files.adapter_files import ADAPTER_DIR, CONFIG_FILE, WEIGHTS_FILE
from lmoe.files.lock import taken_by_others
from lmoe.files.run_folder import hydra_quoted
from lmoe.resume.stopping import Stopped
from lmoe.study.jobs import PRUNED_FILE, ROWS_FILE, Job, finished, read_job

STUDY_ABOVE = 3
"""Folders between that of a job and that of its study."""
LOCK_FILE = "job.lock"
LOOK_AGAIN = 0.5
"""Seconds between looks at whether another process of the same job has ended."""
LONGEST_WAIT = 600.0
"""Seconds for another process of the same job to end."""
LOOK_EVERY = 5.0
"""Seconds between looks at whether the study is still there."""


def main(place: Path) -> int:
    """Train what is not trained yet, and judge it.

    Returns:
        The exit code of the run that failed, or 0.
    """
    prepare_threads()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        with (place / LOCK_FILE).open("a") as file:
            _wait_for(file, place)
            return _do(place)
    except LmoeError as error:
        sys.stderr.write(f"{with_keys(str(error))}\n")
        return 1
    except Stopped as stopped:
        return 0 if (place / PRUNED_FILE).exists() else stopped.exit_code


def _wait_for(file: TextIO, place: Path) -> None:
    """Hold the lock of a job: of a study that was killed and begun again, the first process of the job may not have
    ended yet.

    Raises:
        StudyError: it does not end.
    """
    until = time.monotonic() + LONGEST_WAIT
    while taken_by_others(file):
        if time.monotonic() > until:
            raise StudyError(f"{place} is in use by another process since {LONGEST_WAIT:g} s; stop it")
        time.sleep(LOOK_AGAIN)


def _do(place: Path) -> int:
    job = read_job(place)
    if job.watch is not None:
        threading.Thread(target=_prune, args=(place, job), daemon=True).start()
    to_judge = job.judging is not None and not (place / ROWS_FILE).exists()
    for run in job.runs:
        folder = place / run.folder
        if finished(folder) is None or (to_judge and not _has_adapter(folder)):
            code = train([*run.settings, "resume=auto", f"hydra.run.dir={hydra_quoted(folder)}"])
            if code:
                return 0 if (place / PRUNED_FILE).exists() else code
            if finished(folder) is None:
                sys.stderr.write("the run has ended before its last step\n")
                return 1
    if to_judge:
        from lmoe.study.judge import judge

        judge(job, place)
    return 0


def _has_adapter(run: Path) -> bool:
    """Whether the adapter of a run is still there, which a study needs no more once the run is judged."""
    return all((run / ADAPTER_DIR / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))


def _prune(place: Path, job: Job) -> None:
    """Stop at the next safe place once the validations of a job have fallen behind."""
    from lmoe.study.sampling import should_prune
    from lmoe.study.tuning import validated

    reported: set[int] = set()
    while True:
        time.sleep(LOOK_EVERY)
        assert job.watch is not None
        scores = validated(place, job, job.watch.metric)
        if should_prune(job.watch, place.parents[STUDY_ABOVE], reported, scores):
            (place / PRUNED_FILE).touch()
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _end_with(parent: int) -> None:
    """Stop at the next safe place once the process that has started this one is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
