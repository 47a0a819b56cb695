"""One process at a time at a file."""

import errno
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
