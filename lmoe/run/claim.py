"""One process at a time in a run directory, and the run's identity."""

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lmoe.errors import LmoeError, TrainingError
from lmoe.files.lock import taken_by_others
from lmoe.files.run_folder import ID_FILE
from lmoe.files.small_file import Reader, leading_out
from lmoe.files.write import write_whole

LOCK_FILE = "run.lock"
IDENTITY = Reader(cure="put it back, or remove it to take that of the checkpoint", what="it")
LONGEST_LOCK = 4096
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Where launchers tell a process its rank; the first that is set counts, as in Lightning."""


def started_by_others() -> bool:
    """Whether a launcher around this process has started it as one of several."""
    return any(name in os.environ for name in RANKS)


def is_first_process(processes: int) -> bool:
    """Whether this process writes for all of its run.

    Args:
        processes: of the run; one alone writes, whatever the variables of a launcher around it say.
    """
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return processes == 1 or (rank == "0" and os.environ.get("NODE_RANK", "0") == "0")


@contextmanager
def claimed(run_dir: Path, *, another: str = "hydra.run.dir=…") -> Iterator[None]:
    """Hold the lock of a run directory inside the block.

    Args:
        another: setting that chooses another folder, for the message.

    Raises:
        TrainingError: another process holds it, the folder cannot be written, or holds what leads out of it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (problem := leading_out(run_dir)) is not None:
            raise TrainingError(f"{run_dir} cannot be worked in: {problem}")

        file = open(run_dir / LOCK_FILE, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise TrainingError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    with file:
        if taken_by_others(file):
            file.seek(0)
            raise TrainingError(
                f"{run_dir} is in use{_holder(file.read(LONGEST_LOCK))}; wait for it, stop it, or choose "
                f"another folder with {another}"
            )
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
        os.fsync(file.fileno())
        try:
            yield
        finally:
            if os.listdir(run_dir) == [LOCK_FILE]:  # nothing came of it
                os.unlink(run_dir / LOCK_FILE)


def stored_id(run_dir: Path) -> str | None:
    """The run's identity, or None where its file is not there (yet, or any more).

    Raises:
        CheckpointError: the file is damaged.
    """
    file = run_dir / ID_FILE
    return IDENTITY.word(file) if file.exists() else None


def store_id(run_dir: Path, run_id: str | None) -> str:
    """Write the identity, made anew without one; call it while the folder is claimed.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    run_id = run_id or uuid.uuid4().hex
    write_whole(run_dir, {ID_FILE: f"{run_id}\n".encode()})
    return run_id


def _holder(text: str) -> str:
    try:
        entries = Reader().parsed(text, LOCK_FILE)
    except LmoeError:
        return ""
    known = [entries.get(key) if isinstance(entries, dict) else None for key in ("pid", "host", "since")]
    if not all(isinstance(value, int | str) and str(value).isprintable() for value in known):
        return ""
    return ": process {} on {} since {}".format(*known)
