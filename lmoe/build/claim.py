"""One process at a time in a run directory, and the run's identity: both in `<run>/run.lock`."""

import errno
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lmoe.errors import TrainingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = "run.lock"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Where launchers tell a process its rank; the first that is set counts, as in Lightning."""


def is_first_process() -> bool:
    """Whether this process writes for all of its run."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return rank == "0" and os.environ.get("NODE_RANK", "0") == "0"


@contextmanager
def claimed(run_dir: Path) -> Iterator[str]:
    """Hold the lock of a run directory inside the block; yields the id of the run, made at its first start.

    NOTE lockf, not flock: a flock is inherited by loader workers and outlives a killed run.

    Raises:
        TrainingError: another process holds it, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # NOTE neither "a+", which writes at the end only, nor "w+", which empties the file.
        file = os.fdopen(os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    holder = _holder(file.read())
                    raise TrainingError(f"{run_dir} is in use{holder}; wait for it, or stop it first") from None
                # Some network file systems have no locks: the run goes on without.
        text = file.read()
        run_id = _entries(text).get("run") or uuid.uuid4().hex
        entries = {
            "run": run_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        # NOTE at no moment is the file empty or torn: a kill or a full disk must not take the run's id.
        file.seek(0)
        file.write(json.dumps(entries).ljust(len(text) - 1) + "\n")
        file.flush()
        os.fsync(file.fileno())
        try:
            yield run_id
        finally:
            if os.listdir(run_dir) == [LOCK_FILE]:  # nothing came of it
                os.unlink(run_dir / LOCK_FILE)


def _entries(text: str) -> dict:
    try:
        entries = json.loads(text)
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}


def _holder(text: str) -> str:
    entries = _entries(text)
    return f": process {entries['pid']} on {entries['host']} since {entries['since']}" if "pid" in entries else ""
