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
from lmoe.errors import DivergedError, LmoeError, StudyError
from lmoe.files.adapter_files import ADAPTER_DIR, CONFIG_FILE, WEIGHTS_FILE
from lmoe.files.lock import free_within
from lmoe.files.run_folder import hydra_quoted
from lmoe.resume.stopping import Stopped, StopSignals
from lmoe.study.jobs import DIVERGED_CODE, PRUNED_FILE, ROWS_FILE, Job, finished, read_job

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
        The exit code of the run that failed, DIVERGED_CODE, or 0.
    """
    prepare_threads()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        with StopSignals(), (place / LOCK_FILE).open("a") as file:
            _wait_for(file, place)
            return _do(place)
    except LmoeError as error:
        sys.stderr.write(f"{with_keys(str(error))}\n")
        return DIVERGED_CODE if isinstance(error, DivergedError) else 1
    except Stopped as stopped:
        return 0 if (place / PRUNED_FILE).exists() else stopped.exit_code


def _wait_for(file: TextIO, place: Path) -> None:
    """Hold the lock of a job: of a study that was killed and begun again, the first process of the job may not have
    ended yet.

    Raises:
        StudyError: it does not end.
    """
    if not free_within(file, LONGEST_WAIT, LOOK_AGAIN):
        raise StudyError(f"{place} is in use by another process since {LONGEST_WAIT:g} s; stop it")


def _do(place: Path) -> int:
    job = read_job(place)
    pruner = Pruner(place, job)
    if job.watch is not None:
        threading.Thread(target=pruner.watch, daemon=True).start()
    try:
        return _train_and_judge(place, job, pruner)
    finally:
        pruner.end()


def _train_and_judge(place: Path, job: Job, pruner: "Pruner") -> int:
    to_judge = job.judging is not None and not (place / ROWS_FILE).exists()
    for run in job.runs:
        folder = place / run.folder
        if finished(folder) is None or (to_judge and not _has_adapter(folder)):
            done = pruner.end if run is job.runs[-1] else None
            diverged = threading.Event()
            settings = [*run.settings, "resume=auto", f"hydra.run.dir={hydra_quoted(folder)}"]
            code = train(settings, steps_done=done, diverged=diverged.set)
            if diverged.is_set():
                return DIVERGED_CODE
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


class Pruner:
    """Stops a job at the next safe place once its validations have fallen behind, as long as it has steps to do.

    Args:
        place: folder of the job.
        job: what it is, and what it is watched for.
    """

    def __init__(self, place: Path, job: Job) -> None:
        self.place, self.job = place, job
        self._ended, self._deciding = threading.Event(), threading.Lock()

    def end(self) -> None:
        """The last step is done: whatever is found from now on prunes nothing."""
        with self._deciding:
            self._ended.set()

    def watch(self) -> None:
        """Look at the validations again and again; what goes wrong is said once, and looked at again."""
        reported: set[int] = set()
        said = ""
        while not self._ended.wait(LOOK_EVERY):
            try:
                behind = self._is_behind(reported)
            except Exception as error:  # of Optuna, or of a file that is being written; the run itself goes on
                found = f"whether this job is to be pruned cannot be told: {type(error).__name__}: {error}"
                if found != said:
                    sys.stderr.write(f"{found}\n")
                said = found
                continue
            if behind:
                self._stop()
                return

    def _is_behind(self, reported: set[int]) -> bool:
        from lmoe.study.sampling import should_prune
        from lmoe.study.tuning import validated

        assert self.job.watch is not None
        scores = validated(self.place, self.job, self.job.watch.metric)
        return should_prune(self.job.watch, self.place.parents[STUDY_ABOVE], reported, scores)

    def _stop(self) -> None:
        """NOTE under the lock: the signal comes before the last step is done, and so finds a run that it stops."""
        with self._deciding:
            if not self._ended.is_set():
                (self.place / PRUNED_FILE).touch()
                os.kill(os.getpid(), signal.SIGTERM)


def _end_with(parent: int) -> None:
    """Stop at the next safe place once the process that has started this one is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
