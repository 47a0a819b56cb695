"""One process at a time at a file."""

import errno
import time
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def taken_by_others(file: IO) -> bool:
    """Whether another process holds the lock of an open file; else this one holds it from now on, until it closes the
    file or ends.

    Where there are no locks (Windows, some network file systems) nobody holds any.

    NOTE lockf, not flock: a flock is inherited by loader workers and outlives a killed run.

    Args:
        file: open for writing.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def free_within(file: IO, seconds: float, look_again: float) -> bool:
    """Whether this process comes to hold the lock of an open file, after waiting for others.

    Args:
        file: open for writing.
        seconds: the longest wait.
        look_again: seconds between two looks.
    """
    until = time.monotonic() + seconds
    while taken_by_others(file):
        if time.monotonic() > until:
            return False
        time.sleep(look_again)
    return True
